"""The grouped matmul: each row is multiplied by the weight of its group.

Rows of no group give 0. Every implementation is compared with a loop over rows in float64, with
all gradients. Of tokamax's two kernels, Pallas can interpret the one for Triton on a CPU; the other
one is only compiled (tests/compilers).
"""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from mod_jax.config import ConfigError
from mod_jax.ops import grouped_matmul as module
from mod_jax.ops import nvidia
from mod_jax.ops.grouped_matmul import grouped_matmul, grouped_matmul_oracle

SIZES = {
    "uneven": [300, 0, 17, 211],
    "all to the last": [0, 0, 0, 600],
    "one row each": [1, 1, 1, 1],
    "rows of no group": [256, 256, 0, 1],
    "nothing": [0, 0, 0, 0],
}
PATHS = ["blocks", "ragged_dot", "tokamax"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """The name of an implementation that runs on this CPU."""
    monkeypatch.setattr(module, "tgmm", functools.partial(module.tgmm, interpret=True))
    if request.param != "tokamax":
        yield request.param
        return
    pytest.importorskip("tokamax", reason="requirements-test.txt has it")
    interpreted = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(pallas, "pallas_call", interpreted)
    with nvidia.tokamax().config.cross_compile(True):
        yield request.param


def operands(rows, dtype=jnp.float32, widths=(24, 40)):
    """x, w and dy."""
    inner, outer = widths
    keys = jax.random.split(jax.random.key(rows), 3)
    shapes = [(rows, inner), (4, inner, outer), (rows, outer)]
    return tuple(jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes))


def operands_for(path, dtype=jnp.float32):
    """Pallas interprets kernels only where blocks are whole, and reads beyond the last group."""
    return operands(768, dtype, (128, 128)) if path == "tokamax" else operands(600, dtype)


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


def same(found, expected, tolerance=1e-4):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_path_computes_each_row_and_gradient(path, sizes):
    x, w, dy = operands_for(path)
    function = functools.partial(grouped_matmul, implementation=path)
    same(with_gradients(function, x, w, jnp.array(sizes), dy), by_rows(x, w, sizes, dy))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_oracle_computes_each_row_and_gradient(sizes):
    x, w, dy = operands(600)
    found = with_gradients(grouped_matmul_oracle, x, w, jnp.array(sizes), dy)
    same(found, by_rows(x, w, sizes, dy))


def test_without_a_name_the_platform_chooses():
    x, w, _ = operands(600)
    default, blocks = (
        jax.make_jaxpr(functools.partial(grouped_matmul, **named))(x, w, jnp.array(SIZES["uneven"]))
        for named in ({}, {"implementation": "blocks"})
    )
    assert str(default) == str(blocks)


def test_on_a_gpu_a_missing_library_is_an_error_with_its_remedy(monkeypatch):
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setitem(sys.modules, "tokamax", None)
    nvidia.tokamax.cache_clear()
    x, w, _ = operands(7)
    with pytest.raises(ConfigError, match=r'tokamax.* pip install "mod-jax\[cuda\]"'):
        grouped_matmul(x, w, jnp.array([2, 0, 4, 0]))


@pytest.mark.parametrize("path", ["blocks", "ragged_dot"], indirect=True)
def test_fewer_rows_than_a_block(path):
    x, w, dy = operands(7)
    function = functools.partial(grouped_matmul, implementation=path)
    found = with_gradients(function, x, w, jnp.array([2, 0, 4, 0]), dy)
    same(found, by_rows(x, w, [2, 0, 4, 0], dy), 1e-5)


@pytest.mark.parametrize("path", ["blocks", "tokamax"], indirect=True)
def test_rows_of_no_group_touch_nothing(path):
    x, w, dy = operands_for(path)
    broken = jnp.where(jnp.arange(len(x))[:, None] < 513, x, jnp.nan)
    function = functools.partial(grouped_matmul, implementation=path)
    clean, dirty = (
        with_gradients(function, a, w, jnp.array([256, 256, 0, 1]), dy) for a in (x, broken)
    )
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("path", ["ragged_dot"], indirect=True)
@pytest.mark.parametrize("sizes", [[256, 256, 0, 1], [0, 0, 0, 0], [599, 0, 1, 0]])
def test_what_a_kernel_leaves_in_rows_of_no_group_is_not_kept(path, sizes, monkeypatch):
    """On CPU `ragged_dot` writes 0 there; kernels of accelerators may leave anything."""
    x, w, dy = operands(600)
    without = jnp.arange(600)[:, None] >= sum(sizes)
    product = jax.lax.ragged_dot
    monkeypatch.setattr(
        jax.lax,
        "ragged_dot",
        lambda *args, **how: jnp.where(without, jnp.nan, product(*args, **how)),
    )
    function = functools.partial(grouped_matmul, implementation=path)
    found = with_gradients(function, x, w, jnp.array(sizes), jnp.where(without, jnp.nan, dy))
    same(found, by_rows(x, w, sizes, dy))


def test_bfloat16_is_accumulated_in_float32(path):
    """Products of bfloat16 numbers are exact in float32; all are positive, so that sums grow.

    A sum of 300 of them in bfloat16, or of blocks that were rounded to it, is off by 1e-3.
    """
    sizes = [300, 0, 17, 283]
    x, w, dy = (abs(a) + jnp.bfloat16(1) for a in operands_for(path, jnp.bfloat16))
    product, gradients = module.IMPLEMENTATIONS[path]

    def run(x, w, sizes, dy):
        return product(x, w, sizes), *gradients(x, w, sizes, dy)

    y, dx, dw = jax.jit(run)(x, w, jnp.array(sizes), dy)
    wanted = by_rows(x, w, sizes, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(dw, wanted[2], rtol=1e-6)
    for ours, expected in zip((y, dx), wanted):  # one rounding to bfloat16, at the end
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=2**-8)
    jaxpr = str(jax.make_jaxpr(run)(x, w, jnp.array(sizes), dy))
    dtypes = re.findall(r":(\w+)\[[\d,]+\] = (?:ragged_)?dot_general\[", jaxpr)
    assert set(dtypes) == {"f32"} and len(dtypes) >= 3


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
