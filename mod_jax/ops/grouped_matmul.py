"""A matrix product whose rows come in groups, each group with a weight of its own.

Axes: n rows, D input width, F output width, E groups (experts), t rows of a block.

One function with three fast paths. TPUs use `jax.lax.ragged_dot`, a kernel there for all but the
gradient of the weights, which is megablox's. Everything else that XLA makes of it multiplies all
rows with every group's weight. So a loop runs over blocks of rows on CPU, and tokamax's kernels on
GPUs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

from mod_jax.ops.device_kernel import on_device
from mod_jax.ops.tokamax_matmul import tokamax_gradients, tokamax_matmul
from mod_jax.sharding import platform

BLOCK = 256  # rows of a block on CPU
# Rows, D and F of a block of the gradient on TPU: what a v5e loads in the time of its product. Two
# blocks of each operand, the float32 sum and two results take 12 of its 16 MiB of fast memory.
TILES = (512, 512, 1024)
LANES = 128  # of which the rows of a block are a multiple


def grouped_matmul(
    x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Multiplies each group of rows with the weight of that group.

    Args:
      x: f[n,D], sorted by group. Rows past sum(group_sizes) belong to no group.
      w_edf: f[E,D,F], one weight per group, cast to the dtype of `x` for the product. Its gradient
        is summed in float32, and has its dtype.
      group_sizes: i32[E], rows of each group; they sum to at most n.
      implementation: A key of `IMPLEMENTATIONS`. By default "blocks" for CPUs, "tokamax" for GPUs
        and "ragged_dot" for TPUs. The platform is that of the ambient mesh, or else of the default
        device.

    Returns:
      f[n,F] in the dtype of `x`, accumulated in float32; 0 in the rows of no group.

    Raises:
      ConfigError: If tokamax is needed and not installed.
    """
    # equivalent to: grouped_matmul_oracle(x, w_edf, group_sizes)
    if implementation is None:
        implementation = {"cpu": "blocks", "gpu": "tokamax"}.get(platform(), "ragged_dot")
    return _grouped_matmul(implementation, x, w_edf, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
    implementation: str, x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    return IMPLEMENTATIONS[implementation].product(x, w_edf.astype(x.dtype), group_sizes)


def _forward(implementation: str, x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array):
    dtype = jnp.zeros((), w_edf.dtype)  # what is saved has to be an array
    w = w_edf.astype(x.dtype)
    return _grouped_matmul(implementation, x, w, group_sizes), (x, w, group_sizes, dtype)


def _backward(implementation: str, saved: tuple, dy: jax.Array):
    *operands, dtype = saved
    dx, dw_edf = IMPLEMENTATIONS[implementation].gradients(*operands, dy)
    return dx, dw_edf.astype(dtype.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def grouped_matmul_oracle(x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` by its definition: every row times every weight, of which one is kept."""
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(x)), side="right")
    one_hot_ne = jax.nn.one_hot(group, len(w_edf), dtype=x.dtype)
    y = jnp.einsum("nd,edf,ne->nf", x, w_edf, one_hot_ne, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _ragged(x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` by `ragged_dot`."""
    y = jax.lax.ragged_dot(x, w_edf, group_sizes, preferred_element_type=jnp.float32)
    y = y.astype(x.dtype)
    grouped = jnp.arange(len(x)) < group_sizes.sum()
    return jnp.where(grouped[:, None], y, 0)  # kernels may leave rows of no group uninitialised


def _ragged_gradients(x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array, dy: jax.Array):
    """(dx in the dtype of `x`, dw f32[E,D,F])."""
    dx = _ragged(dy, w_edf.swapaxes(1, 2), group_sizes)
    rows = min(TILES[0], -(-len(x) // LANES) * LANES)
    padding = ((0, -len(x) % rows), (0, 0))
    tiles = (rows, min(TILES[1], x.shape[1]), min(TILES[2], dy.shape[1]))

    def summed(x, dy, group_sizes):
        return tgmm(x.T, dy, group_sizes, jnp.float32, tiles)

    return dx, on_device(summed, jnp.pad(x, padding), jnp.pad(dy, padding), group_sizes)


def _each_block(body: Callable, start: jax.Array, rows: int, group_sizes: jax.Array) -> jax.Array:
    """Loops over blocks of rows that cover all groups, and nothing else.

    A block holds rows of one group only: it ends with its group, or after t rows. A block that
    would reach past the last row is moved back; `mine` then excludes the rows that are not its own.

    Args:
      body: (carry, group, first row, mine bool[t,1]) -> carry, called for each block.
      start: Initial carry.
      rows: n.
      group_sizes: i32[E].
    """
    t = min(BLOCK, rows)
    blocks_e = -(-group_sizes // t)
    last_block_e = jnp.cumsum(blocks_e)
    last_row_e = jnp.cumsum(group_sizes)

    def step(block, carry):
        group = jnp.sum(block >= last_block_e)
        group_start = last_row_e[group] - group_sizes[group]
        block_of_group = block - last_block_e[group] + blocks_e[group]
        begin = group_start + block_of_group * t
        first_row = jnp.minimum(begin, rows - t)
        row = first_row + jnp.arange(t)
        mine = (row >= begin) & (row < last_row_e[group])
        return body(carry, group, first_row, mine[:, None])

    return jax.lax.fori_loop(0, last_block_e[-1], step, start)


def _block_product(
    equation: str, x: jax.Array, w: jax.Array, group_sizes: jax.Array, width: int
) -> jax.Array:
    """Multiplies the rows of `x` with `w[group]`: f[n, width], 0 in the rows of no group."""
    t = min(BLOCK, len(x))

    def body(y, group, first_row, mine):
        block = jax.lax.dynamic_slice_in_dim(x, first_row, t)
        product = jnp.einsum(equation, block, w[group], preferred_element_type=jnp.float32)
        others = jax.lax.dynamic_slice_in_dim(y, first_row, t)
        merged = jnp.where(mine, product.astype(x.dtype), others)
        return jax.lax.dynamic_update_slice_in_dim(y, merged, first_row, 0)

    return _each_block(body, jnp.zeros_like(x, shape=(len(x), width)), len(x), group_sizes)


def _blocks(x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` by a loop over blocks of rows."""
    return _block_product("td,df->tf", x, w_edf, group_sizes, w_edf.shape[2])


def _blocks_gradients(x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array, dy: jax.Array):
    """(dx in the dtype of `x`, dw f32[E,D,F])."""
    t = min(BLOCK, len(x))

    def body(dw_edf, group, first_row, mine):
        x_td, dy_tf = (
            jnp.where(mine, jax.lax.dynamic_slice_in_dim(a, first_row, t), 0) for a in (x, dy)
        )
        product = jnp.einsum("td,tf->df", x_td, dy_tf, preferred_element_type=jnp.float32)
        return dw_edf.at[group].add(product)

    dx = _block_product("tf,df->td", dy, w_edf, group_sizes, x.shape[1])
    dw_edf = _each_block(body, jnp.zeros_like(w_edf, dtype=jnp.float32), len(x), group_sizes)
    return dx, dw_edf


class Implementation(NamedTuple):
    """One way to compute `grouped_matmul`, of weights in the dtype of `x`.

    Attributes:
      product: (x, w_edf, group_sizes) -> f[n,F] in the dtype of `x`.
      gradients: (x, w_edf, group_sizes, dy) -> (dx in the dtype of `x`, dw f32[E,D,F]).
    """

    product: Callable
    gradients: Callable


IMPLEMENTATIONS = {
    "blocks": Implementation(_blocks, _blocks_gradients),
    "ragged_dot": Implementation(_ragged, _ragged_gradients),
    "tokamax": Implementation(tokamax_matmul, tokamax_gradients),
}
