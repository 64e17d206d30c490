"""The grouped matmul: each row is multiplied by the weight of its group.

Rows of no group give 0. Every implementation is compared with a loop over rows in float64, with
all gradients.
"""

import re

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


def blocks_with_gradients(x, w, sizes, dy):
    return module._blocks(x, w, sizes), *module._blocks_gradients(x, w, sizes, dy)


def ragged_with_gradients(x, w, sizes, dy):
    return module._ragged(x, w, sizes), *module._ragged_gradients(x, w, sizes, dy)


PATHS = {"blocks": blocks_with_gradients, "ragged_dot": ragged_with_gradients}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_gradients_of_either_platform(path, sizes):
    """`grouped_matmul` takes those of the CPU here, and `ragged_dot`'s on accelerators."""
    x, w, dy = operands(600)
    found = jax.jit(path)(x, w, jnp.array(sizes), dy)
    for ours, expected in zip(found, by_rows(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("sizes", [[256, 256, 0, 1], [0, 0, 0, 0], [599, 0, 1, 0]])
def test_what_a_kernel_leaves_in_rows_of_no_group_is_not_kept(sizes, monkeypatch):
    """On CPU `ragged_dot` writes 0 there; kernels of accelerators may leave anything."""
    x, w, dy = operands(600)
    without = jnp.arange(600)[:, None] >= sum(sizes)
    product = jax.lax.ragged_dot
    monkeypatch.setattr(
        jax.lax,
        "ragged_dot",
        lambda *args, **how: jnp.where(without, jnp.nan, product(*args, **how)),
    )
    summed = jax.lax.ragged_dot_general

    def kernel(x, dy, *args, **how):
        assert not np.any(np.where(without, dy, 0)), "it may add the rows of no group"
        return summed(x, dy, *args, **how)

    monkeypatch.setattr(jax.lax, "ragged_dot_general", kernel)
    dirty = jnp.where(without, jnp.nan, dy)
    found = ragged_with_gradients(x, w, jnp.array(sizes), dirty)
    for ours, expected in zip(found, by_rows(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_bfloat16_is_accumulated_in_float32(path):
    """Products of bfloat16 numbers are exact in float32; all are positive, so that sums grow.

    A sum of 300 of them in bfloat16, or of blocks that were rounded to it, is off by 1e-3.
    """
    sizes = [300, 0, 17, 283]
    x, w, dy = (abs(a) + jnp.bfloat16(1) for a in operands(600, jnp.bfloat16))
    y, dx, dw = jax.jit(path)(x, w, jnp.array(sizes), dy)
    wanted = by_rows(x, w, sizes, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(dw, wanted[2], rtol=1e-6)
    for ours, expected in zip((y, dx), wanted):  # one rounding to bfloat16, at the end
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=2**-8)
    jaxpr = str(jax.make_jaxpr(path)(x, w, jnp.array(sizes), dy))
    dtypes = re.findall(r":(\w+)\[[\d,]+\] = (?:ragged_)?dot_general\[", jaxpr)
    assert dtypes == ["f32"] * 3


def test_the_gradient_of_a_float32_weight_is_float32():
    x, w, dy = operands(600, jnp.bfloat16)
    sizes = [300, 0, 17, 283]
    w32 = w.astype(jnp.float32)
    y, dx, dw = with_gradients(grouped_matmul, x, w32, jnp.array(sizes), dy)
    same_y, same_dx, rounded = with_gradients(grouped_matmul, x, w, jnp.array(sizes), dy)
    np.testing.assert_array_equal(y, same_y)
    np.testing.assert_array_equal(dx, same_dx)
    assert dw.dtype == jnp.float32
    np.testing.assert_array_equal(dw.astype(jnp.bfloat16), rounded)
    np.testing.assert_allclose(dw, by_rows(x, w, sizes, dy)[2], rtol=1e-5, atol=1e-4)
