"""Attention: the visibility rule, and the fast paths against the oracle and PyTorch."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from mod_jax.config import MeshConfig
from mod_jax.ops.added_dimensions import FORBIDDEN, of_segments
from mod_jax.ops.attention import attention, attention_oracle, attention_to
from mod_jax.ops.splash_attention import splash_attention
from mod_jax.ops.tokamax_attention import tokamax_attention
from mod_jax.ops.visibility import visible
from mod_jax.sharding import ROWS, make_mesh

# Two rows of ten positions. The first holds a chat, a preference pair and padding, the second a
# left-padded prompt.
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2, 2, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
BRANCHES = jnp.array([[0, 0, 0, 0, 0, 1, 1, 2, 2, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])


def random_heads(query_heads, key_heads, dtype=jnp.float32, shape=SEGMENTS.shape):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(k, (*shape, n, 8), dtype) * 2
        for k, n in zip(keys, (query_heads, key_heads, key_heads))
    ]


def sees(row, i, j):
    """Whether query i sees key j, by the rule that `Batch` documents."""
    segment, branch = np.asarray(SEGMENTS)[row], np.asarray(BRANCHES)[row]
    return j <= i and segment[i] == segment[j] and segment[i] != 0 and branch[j] in (0, branch[i])


def test_a_position_sees_its_past_in_its_segment_on_the_prefix_or_its_own_branch():
    mask = visible(SEGMENTS, BRANCHES)
    for row, i, j in itertools.product(range(2), range(10), range(10)):
        assert mask[row, i, j] == sees(row, i, j), (row, i, j)


@pytest.mark.parametrize("start", [0, 4, 9])
def test_the_last_queries_alone_see_what_they_see_among_all(start):
    whole = visible(SEGMENTS, BRANCHES)
    part = visible(SEGMENTS[:, start:], BRANCHES[:, start:], SEGMENTS, BRANCHES, jnp.int32(start))
    np.testing.assert_array_equal(part, whole[:, start:])


def value_and_gradients(function, arrays, real):
    """Outputs and gradients of a sum over the real positions, which padding takes no part in."""

    def total(arrays):
        out = function(*arrays)
        return jnp.sum(jnp.where(real, out.astype(jnp.float32), 0) ** 3), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)
    return jnp.where(real, out, 0), *gradients


def same(found, expected, tolerance=1e-5):
    """Each array is near the expected one; the tolerance is a part of its largest number."""
    for a, b in zip(found, expected, strict=True):
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()
        assert error <= tolerance * np.abs(np.asarray(b, np.float32)).max()


def packed(rows, length, seed=0):
    """Segments and branches: a chat, a pair and padding of random lengths; a row of padding."""
    rng = np.random.default_rng(seed)
    segments, branches = np.zeros((2, rows, length), np.int32)
    for row in range(rows - 1):
        cuts = np.sort(rng.choice(np.arange(1, length), 6, replace=False))
        segments[row, : cuts[5]] = np.searchsorted([cuts[0], cuts[4]], np.arange(cuts[5]), "right")
        segments[row, : cuts[5]] += 1
        branches[row, cuts[1] : cuts[2]] = 1
        branches[row, cuts[2] : cuts[4]] = 2
    return jnp.asarray(segments), jnp.asarray(branches)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_to_any_keys_equals_its_oracle_with_gradients(heads):
    arrays, mask = random_heads(*heads), visible(SEGMENTS, BRANCHES)
    found, expected = (
        value_and_gradients(lambda *a, f=f: f(*a, mask), arrays, True)
        for f in (attention_to, attention_oracle)
    )
    same(found, expected)


# one block of keys that are too few to fill it, several blocks, several that are not filled
@pytest.mark.parametrize(
    ("length", "heads"), [(10, (4, 2)), (256, (4, 2)), (300, (4, 2)), (300, (4, 4)), (300, (6, 1))]
)
def test_attention_equals_its_oracle_with_gradients(heads, length):
    segments, branches = packed(3, length)
    arrays = random_heads(*heads, shape=segments.shape)
    real = (segments > 0)[..., None, None]
    mask = visible(segments, branches)
    found = value_and_gradients(lambda *a: attention(*a, segments, branches), arrays, real)
    expected = value_and_gradients(lambda *a: attention_oracle(*a, mask), arrays, real)
    same(found, expected)


@pytest.mark.parametrize("function", [attention, attention_to], ids=["rows", "any keys"])
def test_attention_equals_pytorch_where_something_is_visible(function):
    arrays, mask = random_heads(4, 2), visible(SEGMENTS, BRANCHES)
    query, key, value = (torch.from_numpy(np.array(a)).double().transpose(1, 2) for a in arrays)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.from_numpy(np.array(mask))[:, None], enable_gqa=True
    ).transpose(1, 2)
    real = np.asarray(SEGMENTS) > 0
    sees = (SEGMENTS, BRANCHES) if function is attention else (mask,)
    np.testing.assert_allclose(
        np.asarray(function(*arrays, *sees))[real], expected.numpy()[real], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("length", [10, 257])  # 257: CLIP's 16 x 16 patches and its CLS position
def test_without_segments_every_key_counts(length):
    arrays = random_heads(4, 4, shape=(2, length))
    mask = jnp.ones((2, length, length), bool)
    found = value_and_gradients(attention, arrays, True)
    expected = value_and_gradients(lambda *a: attention_oracle(*a, mask), arrays, True)
    same(found, expected)


NOTHING = jnp.zeros((2, 10), jnp.int32)


@pytest.mark.parametrize(
    ("function", "sees"),
    [
        (attention, (NOTHING, NOTHING)),
        (attention_to, (jnp.zeros((2, 10, 10), bool),)),
        (attention_oracle, (jnp.zeros((2, 10, 10), bool),)),
    ],
    ids=["rows", "any keys", "oracle"],
)
def test_a_row_that_sees_nothing_is_finite_forward_and_backward(function, sees):
    arrays = [a * 1e4 for a in random_heads(4, 2)]
    found = value_and_gradients(lambda *a: function(*a, *sees), arrays, True)
    assert all(bool(jnp.isfinite(a).all()) for a in found)


def test_scores_of_any_size_are_finite():
    """The maximum is subtracted block by block, so that no exponential overflows."""
    segments, branches = packed(2, 300)
    arrays = [a * 1e3 for a in random_heads(4, 2, shape=segments.shape)]
    real = (segments > 0)[..., None, None]
    found = value_and_gradients(lambda *a: attention(*a, segments, branches), arrays, real)
    assert all(bool(jnp.isfinite(a).all()) for a in found)


@pytest.mark.parametrize("length", [10, 300])
def test_bfloat16_is_summed_in_float32(length):
    """Against the oracle on the same numbers: inputs and output are rounded, and the weights."""
    segments, branches = packed(2, length)
    low = random_heads(4, 2, jnp.bfloat16, segments.shape)
    real = (segments > 0)[..., None, None]
    mask = visible(segments, branches)
    found = value_and_gradients(lambda *a: attention(*a, segments, branches), low, real)
    expected = value_and_gradients(
        lambda *a: attention_oracle(*a, mask), [a.astype(jnp.float32) for a in low], real
    )
    assert all(a.dtype == jnp.bfloat16 for a in found)
    same(found, expected, 0.02)


def gradients_of(length, function=attention):
    segments, branches = packed(8, length)
    arrays = random_heads(4, 2, shape=segments.shape)

    def gradients(arrays, segments, branches):
        out, pullback = jax.vjp(lambda *a: function(*a, segments, branches), *arrays)
        return out, pullback(jnp.where((segments > 0)[..., None, None], out, 0))

    return gradients, (arrays, segments, branches)


def test_no_pass_holds_the_scores_of_a_row():
    function, arguments = gradients_of(520)
    text = jax.jit(function).lower(*arguments).compile().as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", text)}
    assert not [s for s in shapes if sum(size >= 520 for size in s) > 1]


def splash(query, key, value, *rows):
    return splash_attention(query, key, value, rows or None, interpret=True)


def tokamax(query, key, value, *rows):
    """As on GPUs, but for tokamax's kernel: the one in plain JAX takes its place."""
    pytest.importorskip("tokamax", reason="requirements-test.txt has it")
    return tokamax_attention(query, key, value, rows or None, kernels=("xla_chunked",))


with_kernels = pytest.mark.parametrize("kernel", [splash, tokamax], ids=["splash", "tokamax"])


@with_kernels
@pytest.mark.parametrize(("length", "heads"), [(10, (4, 2)), (600, (2, 2))])
def test_a_kernel_equals_the_oracle_with_gradients(kernel, length, heads):
    segments, branches = packed(2, length)
    arrays = random_heads(*heads, shape=segments.shape)
    real = (segments > 0)[..., None, None]
    mask = visible(segments, branches)
    found = value_and_gradients(lambda *a: kernel(*a, segments, branches), arrays, real)
    same(found, value_and_gradients(lambda *a: attention_oracle(*a, mask), arrays, real))


@with_kernels
def test_a_kernel_without_segments(kernel):
    arrays = random_heads(2, 2, shape=(1, 150))
    mask = jnp.ones((1, 150, 150), bool)
    found = value_and_gradients(kernel, arrays, True)
    same(found, value_and_gradients(lambda *a: attention_oracle(*a, mask), arrays, True))


@with_kernels
def test_a_kernel_in_bfloat16(kernel):
    segments, branches = packed(2, 150)
    low = random_heads(4, 2, jnp.bfloat16, segments.shape)
    real = (segments > 0)[..., None, None]
    mask = visible(segments, branches)
    found = value_and_gradients(lambda *a: kernel(*a, segments, branches), low, real)
    assert all(a.dtype == jnp.bfloat16 for a in found)
    exact = [a.astype(jnp.float32) for a in low]
    same(found, value_and_gradients(lambda *a: attention_oracle(*a, mask), exact, real), 0.03)


@with_kernels
def test_a_kernel_is_finite_where_nothing_is_seen(kernel):
    found = value_and_gradients(lambda *a: kernel(*a, NOTHING, NOTHING), random_heads(4, 2), True)
    assert all(bool(jnp.isfinite(a).all()) for a in found)


@pytest.mark.parametrize("count", [1, 2, 9, 64])
def test_as_many_segments_as_positions_are_apart(count):
    """The numbers of segments are told apart by their binary digits, up to the longest row."""
    segments = jnp.arange(64)[None] * count // 64 + 1
    foreign, own = of_segments(segments)
    scores = jnp.einsum("bsn,btn->bst", foreign, own)[0]
    equal = segments[0][:, None] == segments[0]
    assert (scores[equal] == 0).all() and (scores[~equal] <= FORBIDDEN).all()


@pytest.mark.parametrize("form", [attention, splash, tokamax], ids=["blocks", "splash", "tokamax"])
def test_a_mesh_splits_rows_and_heads_and_moves_nothing(form):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2), jax.devices()[:8])
    by_head = NamedSharding(mesh, PartitionSpec(ROWS, None, "tensor"))
    by_row = NamedSharding(mesh, PartitionSpec(ROWS))
    function, arguments = gradients_of(130, form)
    split = jax.jit(function, in_shardings=([by_head] * 3, by_row, by_row))
    with jax.set_mesh(mesh):
        compiled = split.lower(*arguments).compile()
    assert not re.findall(r"all-\w+|collective-\w+|reduce-scatter", compiled.as_text())
    found, expected = split(*arguments), jax.jit(function)(*arguments)
    same(jax.tree.leaves(found), jax.tree.leaves(expected))
