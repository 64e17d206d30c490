"""What compilers for accelerators make of the real train step, read from the compiled program.

It runs without an accelerator but needs its compiler: `make check-compilers`. Sizes are small, and
no two of them are equal that the tests tell apart. The rows of an expert are whole blocks of
tokamax's kernels, and the positions that the loss reads whole chunks of its loop.
"""

import math

import pytest
from mesh import mesh_of, options_of

from benchmarks import models
from benchmarks.compiled_step import TRAINS, Step, figures, read_positions
from benchmarks.sizes import Sizes, draw
from mod_jax.config import MeshConfig
from mod_jax.rehearsal import products
from mod_jax.sharding import row_ways

MESHES = {
    "h100-1": MeshConfig(data=1),
    "h100-8": MeshConfig(data=1, fsdp=4, expert=2),
    "v5e-4": MeshConfig(data=1, fsdp=4),
    "v5e-16": MeshConfig(data=1, fsdp=4, expert=2, tensor=2),
}
ROWS = 2  # of a device
EXPERTS = 4


def sizes(rows):
    """A width of 256, 640 in feed-forward layers, 33024 words, 1088 positions of which 512 read."""
    return Sizes(256, 4, 4, 2, 640, 33024, 1088, rows, 112, 14, 128, 4, 4, 512)


@pytest.fixture(scope="module", params=MESHES)
def mesh(request):
    return mesh_of(request.param, MESHES[request.param])


@pytest.fixture(scope="module", params=["mimic", "preference"])
def step(request, mesh):
    work, rows = request.param, ROWS * row_ways(mesh)
    student, teacher = (
        make(sizes(rows), dtype="bfloat16") for make in (models.student, models.teacher)
    )
    batch = models.batch(work, draw(sizes(rows)))
    return Step(models.stage(work, rows, TRAINS), student, teacher, batch)


@pytest.fixture(scope="module")
def found(step, mesh):
    return figures(step, mesh, options_of(mesh))


def test_products_take_no_more_than_the_step_needs(found):
    assert 0.99 < found["ratio"] < 1.15


def test_experts_are_kernels_for_rows_in_groups(found, step, mesh):
    """Three products forward, three for what flows in and three for weights, in two layers."""
    program = found["program"]
    experts, widths = EXPERTS // mesh.shape["expert"], (256, 640 // mesh.shape["tensor"])
    grouped = 0
    for instruction, times in program.runs(lambda loop: 1):
        product = products.product(instruction)
        if product and product.rows:
            grouped += times
        elif product and ("/experts/" in instruction.op_name or not instruction.op_name):
            # XLA's dense form on TPU has no name
            assert not products.is_dense_expert_work(instruction, experts, widths), instruction
    assert grouped >= 9 * 2


def test_no_array_has_two_axes_of_positions(found, step):
    length = step.batch.tokens.shape[1]
    for array, instruction in found["program"].arrays():
        assert array.shape.count(length) < 2, instruction


def test_no_array_has_tokens_and_words(found, step, mesh):
    slices, readers = mesh.shape["tensor"] * mesh.shape["expert"], mesh.shape["expert"]
    words = step.student.decoder.vocab_size // slices
    tokens = read_positions(step) * readers // row_ways(mesh)
    for array, instruction in found["program"].arrays():
        if words in array.shape:
            assert math.prod(array.shape) // words < tokens, instruction
