"""The grouped matmul: each row is multiplied by the weight of its group.

Rows of no group give 0. Every implementation is compared with a loop over rows in float64, with
all gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_jax.ops import grouped_matmul as module
from mod_jax.ops.grouped_matmul import grouped_matmul, grouped_matmul_oracle

SIZES = {
    "uneven": [300, 0, 17, 211],
    "all to the last": [0, 0, 0, 600],
    "one row each": [1, 1, 1, 1],
    "rows of no group": [256, 256, 0, 1],
    "nothing": [0, 0, 0, 0],
}


def operands(rows, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(rows), 3)
    x, w, dy = (
        jax.random.normal(k, s) for k, s in zip(keys, [(rows, 24), (4, 24, 40), (rows, 40)])
    )
    return x.astype(dtype), w.astype(dtype), dy.astype(dtype)


def with_gradients(function, x, w, sizes, dy):
    def run(x, w, sizes, dy):
        y, pullback = jax.vjp(lambda x, w: function(x, w, sizes), x, w)
        return y, *pullback(dy)

    return jax.jit(run)(x, w, sizes, dy)


def by_rows(x, w, sizes, dy):
    """Output and gradients of a loop over rows, in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row], dx[row] = x[row] @ w[group], w[group] @ dy[row]
        dw[group] += np.outer(x[row], dy[row])
    return y, dx, dw


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    "function",
    [grouped_matmul, module._ragged, grouped_matmul_oracle],
    ids=["blocks", "ragged_dot", "oracle"],
)
def test_every_path_computes_each_row_and_gradient(function, sizes):
    x, w, dy = operands(600)
    for ours, expected in zip(
        with_gradients(function, x, w, jnp.array(sizes), dy), by_rows(x, w, sizes, dy), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_fewer_rows_than_a_block():
    x, w, dy = operands(7)
    for ours, expected in zip(
        with_gradients(grouped_matmul, x, w, jnp.array([2, 0, 4, 0]), dy),
        by_rows(x, w, [2, 0, 4, 0], dy),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_rows_of_no_group_touch_nothing():
    x, w, dy = operands(600)
    broken = jnp.where(jnp.arange(600)[:, None] < 513, x, jnp.nan)
    clean, dirty = (
        with_gradients(grouped_matmul, a, w, jnp.array([256, 256, 0, 1]), dy) for a in (x, broken)
    )
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_is_accumulated_in_float32():
    x, w, dy = operands(600, jnp.bfloat16)
    sizes = [300, 0, 17, 283]
    for ours, expected in zip(
        with_gradients(grouped_matmul, x, w, jnp.array(sizes), dy),
        by_rows(x, w, sizes, dy),
        strict=True,
    ):
        assert ours.dtype == jnp.bfloat16
        # rtol: one rounding to bfloat16; atol: the float32 sum of up to 300 terms before it
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=2**-8, atol=1e-4)
