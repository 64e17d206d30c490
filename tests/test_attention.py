"""Attention: the visibility rule, and the fast path against the oracle and PyTorch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mod_jax.ops.attention import attention, attention_oracle, visible

# Two rows of ten positions. The first holds a chat, a preference pair and padding, the second a
# left-padded prompt.
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2, 2, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
BRANCHES = jnp.array([[0, 0, 0, 0, 0, 1, 1, 2, 2, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])


def random_heads(query_heads, key_heads, dtype=jnp.float32):
    rows, length = SEGMENTS.shape
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(k, (rows, length, n, 8), dtype) * 2
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


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_equals_its_oracle_with_gradients(heads):
    arrays, mask = random_heads(*heads), visible(SEGMENTS, BRANCHES)

    def value_and_gradients(function):
        return jax.value_and_grad(lambda arrays: (function(*arrays, mask) ** 3).sum())(arrays)

    np.testing.assert_allclose(
        attention(*arrays, mask), attention_oracle(*arrays, mask), rtol=1e-5, atol=1e-6
    )
    found, expected = value_and_gradients(attention), value_and_gradients(attention_oracle)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


def test_attention_equals_pytorch_where_something_is_visible():
    arrays, mask = random_heads(4, 2), visible(SEGMENTS, BRANCHES)
    query, key, value = (torch.from_numpy(np.array(a)).double().transpose(1, 2) for a in arrays)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.from_numpy(np.array(mask))[:, None], enable_gqa=True
    ).transpose(1, 2)
    real = np.asarray(SEGMENTS) > 0
    np.testing.assert_allclose(
        np.asarray(attention(*arrays, mask))[real], expected.numpy()[real], rtol=1e-5, atol=1e-6
    )


def test_without_a_mask_every_key_counts():
    arrays = random_heads(4, 4)
    np.testing.assert_allclose(
        attention(*arrays),
        attention_oracle(*arrays, jnp.ones((2, 10, 10), bool)),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("function", [attention, attention_oracle])
def test_a_row_that_sees_nothing_is_finite_forward_and_backward(function):
    arrays, mask = random_heads(4, 2), jnp.zeros((2, 10, 10), bool)
    value, gradients = jax.value_and_grad(lambda arrays: (function(*arrays, mask) ** 2).sum())(
        arrays
    )
    assert all(bool(jnp.isfinite(a).all()) for a in (value, *gradients))


def test_bfloat16_stays_near_float32():
    arrays, mask = random_heads(4, 2), visible(SEGMENTS, BRANCHES)
    low = attention(*(a.astype(jnp.bfloat16) for a in arrays), mask)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), attention(*arrays, mask), atol=0.1)
