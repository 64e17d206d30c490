"""Vocabulary losses: the values and gradients of the full logits, without an array [B,S,V].

The full computation is done by torch in float64.

Axes: B rows, S positions, D width, V vocabulary.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from mod_jax import sharding
from mod_jax.config import MeshConfig
from mod_jax.ops import vocab_losses
from mod_jax.ops.vocab_losses import Block

OPTIMIZED = True

B, S, D, D_TEACHER, V = 8, 12, 16, 24, 64
CHUNKS = Block(8)  # several, the last one never full
TILES = Block(8, 24)  # the last one of a range of words never full
MASKS = {
    "uneven": lambda random: random.random((B, S)) < np.linspace(0, 0.9, B)[:, None],
    "all": lambda random: np.ones((B, S), bool),
    "one": lambda random: np.arange(B * S).reshape(B, S) == 50,
    "none": lambda random: np.zeros((B, S), bool),
}


def problem(mask="uneven", student_words=V, teacher_words=V, dtype=np.float32):
    """Random arguments of `weighted_divergence`, and weights [2,B,S] of its two values.

    Returns:
      ((student hidden, student head, teacher hidden, teacher head, targets, mask), weights).
    """
    random = np.random.default_rng(0)
    sizes = ((B, S, D), (student_words, D), (B, S, D_TEACHER), (teacher_words, D_TEACHER))
    arrays = [
        random.normal(size=size).astype(dtype) * (0.5 if len(size) == 2 else 1) for size in sizes
    ]
    targets = random.integers(0, min(student_words, teacher_words), (B, S)).astype(np.int32)
    return (*arrays, targets, MASKS[mask](random)), random.normal(size=(2, B, S)).astype(np.float32)


def expected(inputs, weights):
    """What torch computes in float64 from the full logits.

    Returns:
      [log-probabilities, KL, gradient in the student's hidden states, gradient in its head]; the
      gradients are those of the weighted sum.
    """
    student, student_head, teacher, teacher_head = (
        torch.tensor(x, dtype=torch.float64) for x in inputs[:4]
    )
    targets = torch.tensor(inputs[4]).long()
    mask = torch.tensor(inputs[5])
    weights = torch.tensor(weights, dtype=torch.float64)
    student.requires_grad_()
    student_head.requires_grad_()
    logits, reference = student @ student_head.T, teacher @ teacher_head.T
    shared = min(logits.shape[-1], reference.shape[-1])
    cross_entropy = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    log_probs = -cross_entropy.view(B, S) * mask
    words = [x[..., :shared].log_softmax(-1) for x in (logits, reference)]
    kl = torch.nn.functional.kl_div(*words, log_target=True, reduction="none").sum(-1) * mask
    (log_probs * weights[0] + kl * weights[1]).sum().backward()
    return [x.detach().numpy() for x in (log_probs, kl, student.grad, student_head.grad)]


SCALE = -1.7  # what the backward pass multiplies with


@functools.partial(jax.jit, static_argnames=("differentiate", "block"))
def ours(inputs, weights, differentiate=(0, 1), block=CHUNKS):
    """What `weighted_divergence` computes: weighted sum, log-probabilities, KL, and gradients.

    Args:
      inputs, weights: from `problem`.
      differentiate: numbers of the arguments to differentiate by.
      block: what is held of the logits at a time.
    """

    def objective(*sides):
        total, *values = vocab_losses.weighted_divergence(
            *sides, *inputs[4:], *weights, block=block
        )
        return SCALE * total, (total, *values)

    gradients, (total, *values) = jax.grad(objective, differentiate, has_aux=True)(*inputs[:4])
    return total, *values, *(g / SCALE for g in gradients)


def weighted_sum(desired, weights):
    """What `weighted_divergence` computes first, from what `expected` returns."""
    return (desired[0] * weights[0] + desired[1] * weights[1]).sum()


def check(actual, desired, tolerance=2e-5):
    for a, d in zip(actual, desired, strict=True):
        np.testing.assert_allclose(a, d, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("words", [(64, 64), (56, 64), (64, 56)])
def test_one_sweep_makes_the_values_and_gradients_of_the_full_logits(mask, words):
    inputs, weights = problem(mask, *words)
    desired = expected(inputs, weights)
    check(ours(inputs, weights), [weighted_sum(desired, weights), *desired])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("words", [(64, 64), (56, 64), (64, 56), (64, 48), (16, 20)])
def test_tiles_make_the_values_and_gradients_of_the_full_logits(mask, words):
    inputs, weights = problem(mask, *words)
    desired = expected(inputs, weights)
    wanted = [weighted_sum(desired, weights), *desired[:3]]
    check(ours(inputs, weights, differentiate=(0,), block=TILES), wanted)


def test_tiles_take_logits_that_only_a_running_maximum_can_exponentiate():
    """Logits that grow from tile to tile, by hundreds."""
    (hidden, head, teacher, teacher_head, targets, mask), weights = problem("all")
    growing = np.linspace(0, 60, V, dtype=np.float32)[:, None]
    inputs = (abs(hidden), head + growing, abs(teacher), teacher_head + growing, targets, mask)
    desired = expected(inputs, weights)
    assert np.abs(inputs[0] @ inputs[1].T).max() > 500
    wanted = [weighted_sum(desired, weights), *desired[:3]]
    check(ours(inputs, weights, differentiate=(0,), block=TILES), wanted, tolerance=2e-4)


@pytest.mark.parametrize(
    ("block", "differentiate"), [(CHUNKS, (0,)), (CHUNKS, (1,)), (TILES, (0, 1))], ids=str
)
def test_one_sweep_for_either_argument(block, differentiate):
    """Tiles are for a frozen head; one that trains takes chunks of as many positions."""
    inputs, weights = problem()
    desired = expected(inputs, weights)
    gradients = [desired[2 + number] for number in differentiate]
    wanted = [weighted_sum(desired, weights), *desired[:2], *gradients]
    check(ours(inputs, weights, differentiate=differentiate, block=block), wanted)


@pytest.mark.parametrize("mask", MASKS)
def test_weighted_log_probs_are_those_of_the_full_logits(mask):
    inputs, weights = problem(mask)
    student, head, _, _, targets, mask = inputs

    def objective(hidden, head):
        total, log_probs = vocab_losses.weighted_log_probs(
            hidden, head, targets, mask, weights[0], block=CHUNKS
        )
        return SCALE * total, (total, log_probs)

    gradients, (total, log_probs) = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(
        student, head
    )
    weights = weights * np.array([1, 0], np.float32)[:, None, None]
    desired = expected(inputs, weights)
    wanted = (weighted_sum(desired, weights), desired[0], *desired[2:])
    check((total, log_probs, *(g / SCALE for g in gradients)), wanted)


def test_values_beside_a_weighted_sum_have_no_gradient():
    inputs, weights = problem()
    gradients = jax.grad(
        lambda *sides: sum(
            x.sum()
            for x in vocab_losses.weighted_divergence(*sides, *inputs[4:], *weights, block=CHUNKS)[
                1:
            ]
        ),
        (0, 1),
    )(*inputs[:4])
    check(gradients, (0, 0), tolerance=0)


@pytest.mark.parametrize("trains", [(0,), (0, 1)])
def test_bfloat16_gradients_are_those_of_float64_but_for_rounding(trains):
    """Of the sum and of the positions: rows that are scaled later are rounded once more."""
    inputs, weights = problem()
    student, head, teacher, teacher_head, targets, mask = inputs
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (student, head, teacher, teacher_head)]
    inputs = [*(np.asarray(x, np.float32) for x in rounded), targets, mask]
    short = [x.astype(jnp.bfloat16) if x.ndim == 3 else x for x in inputs]
    desired = expected(inputs, weights)
    found = [ours(short, weights, differentiate=trains)[3:]]
    wanted = [desired[2:]]

    def log_probs(hidden, head):
        each = vocab_losses.token_log_probs(hidden, head, targets, mask, block=CHUNKS)
        return jnp.sum(each * weights[0])

    found.append(jax.jit(jax.grad(log_probs, trains))(*short[:2]))
    wanted.append(expected(inputs, weights * np.array([1, 0], np.float32)[:, None, None])[2:])
    for gradients, exact in zip(found, wanted):
        assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32][: len(trains)]
        for g, e in zip(gradients, exact):
            np.testing.assert_allclose(
                np.asarray(g, np.float64), e, rtol=0, atol=2**-7 * np.abs(e).max()
            )


def test_the_oracle_agrees_with_float64():
    inputs, weights = problem("uneven", 64, 56)
    check(vocab_losses.divergence_oracle(*inputs), expected(inputs, weights)[:2])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("block", "differentiate"), [(CHUNKS, (0, 1)), (TILES, (0,))], ids=str)
def test_log_probs_alone(mask, block, differentiate):
    inputs, weights = problem(mask)
    student, head, _, _, targets, mask = inputs

    def objective(hidden, head):
        log_probs = vocab_losses.token_log_probs(hidden, head, targets, mask, block=block)
        return jnp.sum(log_probs * weights[0]), log_probs

    gradients, log_probs = jax.jit(jax.grad(objective, differentiate, has_aux=True))(student, head)
    desired = expected(inputs, weights * np.array([1, 0], np.float32)[:, None, None])
    check((log_probs, *gradients), (desired[0], *desired[2:][: len(differentiate)]))
    alone = vocab_losses.token_log_probs(student, head, targets, mask, block=block)
    check([alone], desired[:1])
    check([vocab_losses.token_log_probs_oracle(student, head, targets, mask)], desired[:1])


def test_a_tied_head_sums_its_two_gradients():
    inputs, weights = problem()
    _, embedding, _, _, targets, mask = inputs
    tokens = np.random.default_rng(1).integers(0, V, (B, S))

    def objective(embedding):
        return jnp.sum(
            weights[0]
            * vocab_losses.token_log_probs(
                jnp.tanh(embedding[tokens]), embedding, targets, mask, block=CHUNKS
            )
        )

    weight = torch.tensor(embedding, dtype=torch.float64, requires_grad=True)
    log_probs = (
        (weight[torch.tensor(tokens)].tanh() @ weight.T)
        .log_softmax(-1)
        .gather(-1, torch.tensor(targets).long()[..., None])[..., 0]
    )
    (
        log_probs * torch.tensor(mask) * torch.tensor(weights[0], dtype=torch.float64)
    ).sum().backward()
    check([jax.jit(jax.grad(objective))(embedding)], [weight.grad.numpy()])


def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient():
    (hidden, head, _, _, targets, mask), weights = problem("all")
    inputs = (hidden, head, hidden, head, targets, mask)
    weights *= np.array([0, 1], np.float32)[:, None, None]
    _, _, kl, d_hidden, d_head = ours(inputs, weights)
    check((kl, d_hidden, d_head), (0, 0, 0), tolerance=1e-6)
    _, _, kl, d_hidden = ours(inputs, weights, differentiate=(0,), block=TILES)
    check((kl, d_hidden), (0, 0), tolerance=1e-6)


@pytest.mark.parametrize("block", [CHUNKS, TILES], ids=str)
def test_cross_entropy_is_the_divergence_plus_the_teachers_entropy(block):
    inputs, weights = problem("all")
    teacher = torch.tensor(inputs[2] @ inputs[3].T, dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=teacher).entropy().numpy()
    kl, cross_entropy = (
        vocab_losses.weighted_divergence(*inputs, *weights, cross_entropy=ce, block=block)[2]
        for ce in (False, True)
    )
    check([cross_entropy], [kl + entropy], tolerance=1e-4)


def test_the_teacher_gets_no_gradient():
    inputs, weights = problem()
    gradients = jax.grad(
        lambda *sides: vocab_losses.weighted_divergence(
            *sides, *inputs[4:], *weights, block=CHUNKS
        )[0],
        (2, 3),
    )(*inputs[:4])
    check(gradients, (0, 0), tolerance=0)


def test_bfloat16_hidden_states_keep_float32_sums():
    # One entry of the head's gradient sums 4096 times 1/4096: in bfloat16 it would stall at 2^-4.
    hidden = jnp.ones((1, 4096, 1), jnp.bfloat16)
    head, targets, mask = (
        jnp.zeros((2, 1)),
        jnp.zeros((1, 4096), jnp.int32),
        jnp.ones((1, 4096), bool),
    )
    log_probs, pull = jax.vjp(
        lambda hidden, head: vocab_losses.token_log_probs(
            hidden, head, targets, mask, block=Block(1)
        ),
        hidden,
        head,
    )
    d_hidden, d_head = pull(jnp.full((1, 4096), 2 / 4096))
    assert (log_probs.dtype, d_hidden.dtype, d_head.dtype) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
    )
    check((log_probs, d_head), (np.log(0.5), [[1], [-1]]), tolerance=1e-6)


def test_every_product_of_bfloat16_asks_for_float32():
    """XLA on CPU keeps float32 whether it is asked or not, so only the program shows it."""
    inputs, weights = problem(dtype=jnp.bfloat16)
    program = str(jax.make_jaxpr(ours)(inputs, weights))
    # logits of both sides, and two gradients
    assert program.count("dot_general[") == program.count("preferred_element_type=float32") == 4


def test_positions_outside_the_mask_are_never_read():
    (hidden, head, _, _, targets, mask), _ = problem()
    poisoned = np.where(mask[..., None], hidden, np.nan)
    no_words = np.where(mask, targets, V + 7)

    def objective(hidden):
        return vocab_losses.token_log_probs(hidden, head, no_words, mask, block=CHUNKS).sum()

    value, gradient = jax.value_and_grad(objective)(poisoned)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("words", [(56, 64), (64, 56)], ids=str)
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=8),
        MeshConfig(data=2, fsdp=2, expert=2),
        MeshConfig(data=2, expert=2, tensor=2),
        MeshConfig(tensor=8),
    ],
    ids=str,
)
def test_eight_devices_agree_with_one(mesh, words):
    """Slices of two vocabularies of different sizes hold different words."""
    inputs, weights = problem("uneven", *words)
    desired = expected(inputs, weights)
    mesh = sharding.make_mesh(mesh)
    rows = sharding.row_sharding(mesh)
    head = NamedSharding(mesh, PartitionSpec(sharding.RULES["vocab"], sharding.RULES["word_embed"]))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, s) for x, s in zip(inputs, (rows, head, rows, head, rows, rows))
        ]
        actual = ours(placed, weights)
        check(actual, [weighted_sum(desired, weights), *desired])
        assert actual[3].sharding.is_equivalent_to(rows, 3)
        assert actual[4].sharding.is_equivalent_to(head, 2)
        in_tiles = ours(placed, weights, differentiate=(0,), block=TILES)
        check(in_tiles, [weighted_sum(desired, weights), *desired[:3]])


def test_eight_devices_sum_the_heads_gradient_in_float32():
    """In bfloat16 the sums over rows would be off by 4e-3; they are those of one device."""
    inputs, weights = problem("uneven")
    inputs = [jnp.asarray(x, jnp.bfloat16) if x.ndim == 3 else x for x in inputs]
    *_, alone = ours(inputs, weights)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = sharding.row_sharding(mesh)
    head = NamedSharding(mesh, PartitionSpec(sharding.RULES["vocab"], sharding.RULES["word_embed"]))
    with jax.set_mesh(mesh):
        places = (rows, head, rows, head, rows, rows)
        *_, d_head = ours([jax.device_put(*pair) for pair in zip(inputs, places)], weights)
    assert d_head.dtype == jnp.float32
    np.testing.assert_allclose(d_head, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def compiled(differentiate, block=CHUNKS):
    """Sizes of all arrays in the compiled loss and its gradients, and the program's text.

    The axes are such that every product of some of them is a different number.
    """
    rows, positions, width, words = 8, 30, 14, 1100
    shapes = [(rows, positions, width), (words, width), (rows, positions, width), (words, width)]
    sides = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    targets, mask = jnp.zeros((rows, positions), jnp.int32), jnp.ones((rows, positions), bool)

    def objective(*sides):
        weights = jnp.ones(mask.shape)
        return vocab_losses.weighted_divergence(
            *sides, targets, mask, weights, weights, block=block
        )[0]

    text = jax.jit(jax.value_and_grad(objective, differentiate)).lower(*sides).compile().as_text()
    shapes = re.findall(r"\w+\[([\d,]+)\]", text)
    return [np.prod([int(n) for n in shape.split(",")]) for shape in shapes], text


def test_no_array_has_positions_and_vocabulary():
    sizes, _ = compiled((0, 1))
    assert 8 * 1100 in sizes  # the logits of a chunk
    assert max(sizes) < 30 * 1100  # less than those of one row, let alone of eight


def test_no_tile_has_all_words():
    sizes, text = compiled((0,), Block(8, 128))
    assert 8 * 128 in sizes
    arrays = {tuple(sorted(map(int, s.split(",")))) for s in re.findall(r"\w+\[([\d,]+)\]", text)}
    assert {shape for shape in arrays if 1100 in shape} == {(14, 1100)}  # the heads


def test_a_frozen_head_costs_no_gradient():
    # Logits of both sides, and the gradient in the hidden states; one product more, the gradient in
    # the head, only if the head trains.
    products = [
        len(re.findall(r" dot\(|__onednn|custom-call\(", compiled(differentiate)[1]))
        for differentiate in ((0,), (0, 1))
    ]
    assert products[1] == products[0] + 1


def products(loss, differentiate, teacher, block=CHUNKS):
    """Number of matrix products in a compiled loss, with its gradients if there are any."""
    (*arrays, targets, mask), weights = problem()
    sides = arrays if teacher else arrays[:2]

    def objective(*sides):
        more = weights[: len(sides) // 2] if loss.__name__.startswith("weighted") else ()
        outputs = loss(*sides, targets, mask, *more, block=block)
        return sum(jnp.sum(x) for x in jax.tree.leaves(outputs))

    run = jax.value_and_grad(objective, differentiate) if differentiate else objective
    text = jax.jit(run).lower(*sides).compile().as_text()
    return len(re.findall(r" dot\(|__onednn|custom-call\(", text))


@pytest.mark.parametrize(
    ("loss", "teacher", "values", "frozen", "trained"),
    [
        (vocab_losses.weighted_log_probs, False, 1, 2, 3),
        (vocab_losses.weighted_divergence, True, 2, 3, 4),
        (vocab_losses.token_log_probs, False, 1, 2, 4),
    ],
)
def test_no_product_is_made_twice(loss, teacher, values, frozen, trained):
    """Logits of each side; for gradients the rows too, and the head's gradient where it trains.

    Without known weights a trained head costs its logits twice.
    """
    made = [products(loss, differentiate, teacher) for differentiate in ((), (0,), (0, 1))]
    assert made == [values, frozen, trained]
    # one tile of all words; a teacher costs one product more
    made = [products(loss, wanted, teacher, Block(8, V)) for wanted in ((), (0,))]
    assert made == [values, frozen + teacher]


def placed_on(mesh, inputs):
    head = NamedSharding(mesh, PartitionSpec(sharding.RULES["vocab"], sharding.RULES["word_embed"]))
    rows = sharding.row_sharding(mesh)
    return [jax.device_put(x, s) for x, s in zip(inputs, (rows, head, rows, head, rows, rows))]


def test_a_mesh_of_one_device_costs_nothing():
    """There the heads would be copied where a `shard_map` begins."""
    inputs, weights = problem()
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        assert "shard_map" not in str(jax.make_jaxpr(ours)(inputs, weights))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=8))):
        assert "shard_map" in str(jax.make_jaxpr(ours)(inputs, weights))


@pytest.mark.parametrize("words", [(64, 64), (56, 64), (64, 56)])
def test_no_device_holds_more_than_its_slice_of_the_vocabulary(words):
    inputs, weights = problem("uneven", *words)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        text = ours.lower(placed_on(mesh, inputs), weights).compile().as_text()
    shapes = re.findall(r"\w+\[([\d,]+)\]", text)
    sizes = {int(n) for shape in shapes for n in shape.split(",")}
    assert words[0] // 2 in sizes
    assert not sizes & set(words)
