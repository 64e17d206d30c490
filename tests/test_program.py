"""Reading compiled programs: loops, products and arrays, of programs whose numbers are known."""

import jax
import jax.numpy as jnp
import pytest

from mod_jax.rehearsal import products
from mod_jax.rehearsal.program import read


def program_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read(jax.jit(function).lower(*arguments).compile().as_text())


def flops(program, trips=None):
    return sum(
        product.flops * times
        for instruction, times in program.runs(trips)
        if (product := products.product(instruction))
    )


def layers(x, weights):
    """Seven layers, each of which multiplies five times."""

    def layer(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x), None

    return jax.lax.scan(layer, x, weights)[0]


def test_loops_in_loops_count_by_their_trips():
    program = program_of(layers, (16, 24), (7, 24, 24))
    assert flops(program) == 7 * 5 * 2 * 16 * 24 * 24


def test_the_gradient_of_a_product_takes_two():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    program = program_of(jax.grad(loss, (0, 1)), (24, 40), (16, 24))
    assert flops(program) == 3 * 2 * 16 * 24 * 40


def test_batches_of_products():
    program = program_of(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (6, 16, 24), (6, 24, 40))
    assert flops(program) == 6 * 2 * 16 * 24 * 40


# A loop as in programs for TPUs, which XLA has unrolled: from 0 up to 8 by 2.
UNROLLED = """
%condition (p: (f32[], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %p = (f32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

%body (q: (f32[], s32[])) -> (f32[], s32[]) {
  %q = (f32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %x = f32[]{:T(128)} get-tuple-element(%q), index=0
  %m = s32[]{:T(128)} get-tuple-element(%q), index=1
  %step = s32[]{:T(128)} constant(2)
  %one = s32[]{:T(128)} constant(1)
  %other = s32[]{:T(128)} add(%m, %one)
  %next = s32[]{:T(128)} add(%m, %step)
  %copied = s32[]{:T(128)} copy(%next), frontend_attributes={text="of
}}, several lines"}, metadata={op_name="counter"}
  ROOT %t = (f32[]{:T(128)}, s32[]{:T(128)}) tuple(%x, %copied)
}

ENTRY %main (a: (f32[], s32[])) -> (f32[], s32[]) {
  %a = (f32[], s32[]) parameter(0)
  ROOT %loop = (f32[], s32[]) while(%a), condition=%condition, body=%body
}
"""


def test_a_loop_without_its_trips_is_counted_by_its_condition():
    times = {instruction.name: times for instruction, times in read(UNROLLED).runs()}
    assert times["next"] == 4
    (copied,) = [i for i, _ in read(UNROLLED).runs() if i.name == "copied"]
    assert copied.op_name == "counter"


def until(x, rounds):
    return jax.lax.fori_loop(0, rounds.astype(int)[0], lambda _, x: jnp.tanh(x @ x), x)


def test_a_loop_of_unknown_length_has_to_be_said():
    program = program_of(until, (16, 16), (1,))
    with pytest.raises(ValueError, match="known at run time only"):
        flops(program)
    assert flops(program, lambda loop: 3) == 3 * 2 * 16**3
    (loop,) = [i for i, _ in program.runs(lambda loop: 1) if i.opcode == "while"]
    assert [products.product(i).flops for i in program.under(loop) if products.product(i)] == [
        2 * 16**3
    ]


def test_arrays_within_a_fusion_are_not_in_memory():
    program = program_of(lambda x: jnp.sum(jnp.exp(x[:, None] - x[None])), (300,))
    shapes = {array.shape for array, _ in program.arrays()}
    assert () in shapes and (300, 300) not in shapes


# Lines of programs for a v5e and an H100, shortened. The experts are 4, of 256 -> 640 dimensions.
DENSE_ON_TPU = """
ENTRY %main (a: bf16[4,2048,256], b: bf16[4,2048,640]) -> f32[4,256,640] {
  %a = bf16[4,2048,256]{1,2,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,2048,640]{1,2,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = f32[4,256,640]{2,1,0:T(8,128)} convolution(%a, %b), @WINDOW@
}
""".replace("@WINDOW@", "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0fb_0io->0bf")
DENSE_ON_GPU = """
ENTRY %main (a: bf16[2048,1024], b: bf16[1024,640]) -> bf16[2048,640] {
  %a = bf16[2048,1024]{1,0} parameter(0)
  %b = bf16[1024,640]{1,0} parameter(1)
  ROOT %c = bf16[2048,640]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


@pytest.mark.parametrize("text", [DENSE_ON_TPU, DENSE_ON_GPU], ids=["tpu", "gpu"])
def test_every_expert_for_every_row_is_recognised(text):
    (product,) = [i for i, _ in read(text).runs() if products.product(i)]
    assert products.product(product) == products.Product(4 * 2 * 2048 * 256 * 640)
    assert products.is_dense_expert_work(product, 4, (256, 640))
    assert not products.is_dense_expert_work(product, 5, (256, 640))


BY_GROUP = """
ENTRY %main (s: s32[67], x: bf16[2048,256], w: bf16[4,256,640]) -> bf16[2048,640] {
  %s = s32[67]{0} parameter(0)
  %x = bf16[2048,256]{1,0} parameter(1)
  %w = bf16[4,256,640]{2,1,0} parameter(2)
  ROOT %y = bf16[2048,640]{1,0} custom-call(%s, %x, /*index=2*/%w), @KERNEL@
}
""".replace("@KERNEL@", 'custom_call_target="mosaic_gpu_v2"')
GROUPS_SUMMED = """
ENTRY %main (s: s32[4], x: bf16[256,2048], y: bf16[2048,640]) -> f32[4,256,640] {
  %s = s32[4]{0} parameter(0)
  %x = bf16[256,2048]{1,0} parameter(1)
  %y = bf16[2048,640]{1,0} parameter(2)
  ROOT %w = f32[4,256,640]{2,1,0} custom-call(%s, %x, %y), custom_call_target="tpu_custom_call"
}
"""
CUBLAS = """
ENTRY %main (x: bf16[2048,256], w: bf16[256,640]) -> bf16[2048,640] {
  %x = bf16[2048,256]{1,0} parameter(0)
  %w = bf16[256,640]{1,0} parameter(1)
  %c = (bf16[2048,640]{1,0}, s8[64]{0}) custom-call(%x, %w), @CALL@
  ROOT %y = bf16[2048,640]{1,0} get-tuple-element(%c), index=0
}
""".replace(
    "@CALL@",
    'custom_call_target="__cublas$gemm", backend_config={"lhs_contracting_dimensions":["1"]}',
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [(BY_GROUP, 2048), (GROUPS_SUMMED, 2048), (CUBLAS, 0)],
    ids=["rows by group", "groups summed", "cublas"],
)
def test_kernels_are_counted_by_their_shapes(text, rows):
    (product,) = [p for i, _ in read(text).runs() if (p := products.product(i))]
    assert product == products.Product(2 * 2048 * 256 * 640, rows)


def test_a_convolution_counts_what_meets_no_padding():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2,), [(1, 1)], dimension_numbers=("NHC", "HIO", "NHC")
        )

    program = program_of(convolve, (3, 9, 8), (3, 8, 5))
    # of the five outputs the first and the last miss one of three inputs
    assert flops(program) == 2 * 3 * (5 * 3 - 2) * 8 * 5
