"""How the parts of a weight travel inside `jax.shard_map`: gathered whole, its gradient scattered.

A weight is split along `fsdp` and `expert`, over which the rows of a batch are split as well
(`sharding.RULES`). So a product of a device's rows needs all parts, and its gradient is a sum over
the devices, of which each keeps its part.

Parts travel along one mesh axis after the other: those of weights as rows of matrices, which need
no copy where they fill tiles of 8 rows, those of gradients as tiles of [8, a multiple of 1024].
This is how XLA for TPUs makes them a gather and a scatter. Along two axes at once, of three
dimensions, or of most other shapes of a gradient, it gathers by a sum of arrays that are zero but
for one part, and scatters by a sum of whole gradients on every device, which both send twice as
much (read in programs for v5e, v5p and v6e; benchmarks/LOG.md).
"""

import math

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec

from mod_jax.sharding import ROWS, mesh_axes

TILE = (8, 1024)
# What makes a whole weight from its parts, and costs little elsewhere.
AGAIN = {"all_gather", "convert_element_type", "pad", "reshape", "slice", "squeeze", "transpose"}


@jax.named_scope("gather_weight")
def whole(part: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Gathers a weight along the axes of its dimensions that rows are split over too.

    Args:
      part: This device's part.
      spec: Mesh axes of each dimension.
    """
    # equivalent to: all_gather(part, axes, axis=dimension, tiled=True) for each dimension
    for dimension, axes in _travelled(spec):
        first = jnp.moveaxis(part, dimension, 0)
        matrix = first.reshape(len(first), -1)
        for axis in reversed(axes):
            matrix = jax.lax.all_gather(matrix, axis, tiled=True)
        part = jnp.moveaxis(matrix.reshape(-1, *first.shape[1:]), 0, dimension)
    return part


@jax.named_scope("scatter_gradient")
def scattered(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Sums the gradient of a whole weight along the axes of `whole`; each device keeps its part.

    Args:
      gradient: f32, of a weight from `whole`, of this device's rows.
      spec: Mesh axes of each dimension of the weight.
    """
    # equivalent to: psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True) for each
    for dimension, axes in _travelled(spec):
        first = jnp.moveaxis(gradient, dimension, 0)
        shape = (len(first) // jax.lax.axis_size(axes), *first.shape[1:])
        tiles = _tiled(first.reshape(-1, *shape))
        for axis in axes:
            tiles = jax.lax.psum_scatter(tiles, axis, tiled=True)
        part = tiles.reshape(-1)[: math.prod(shape)].reshape(shape)
        gradient = jnp.moveaxis(part, 0, dimension)
    return gradient


def own_share(gradient: jax.Array, spec: PartitionSpec, rows: tuple[str, ...] = ROWS) -> jax.Array:
    """`scattered`, and summed along the axes that split rows but not the weight as well.

    `rows` are the axes that split the rows which the gradient is of.
    """
    part = scattered(gradient, spec)
    used = {axis for _, axes in _travelled(spec) for axis in axes}
    rest = tuple(axis for axis in rows if axis not in used and jax.lax.axis_size(axis) > 1)
    return jax.lax.psum(part, rest) if rest else part


def keeps_no_weight(primitive: Primitive, *_, **__) -> bool:
    """A policy of `jax.checkpoint`: the backward pass keeps everything but gathered weights.

    It gathers them again, casts them and brings them into shape.
    """
    return primitive.name not in AGAIN


def _tiled(parts: jax.Array) -> jax.Array:
    """Parts [n,...] as [n * 8, a multiple of 1024], with zeros after the numbers of each."""
    flat = parts.reshape(len(parts), -1)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % math.prod(TILE))))
    return flat.reshape(len(parts) * TILE[0], -1)


def _travelled(spec: PartitionSpec) -> list[tuple[int, tuple[str, ...]]]:
    """(dimension, mesh axes) of the dimensions that are split as rows are."""
    found = [(d, tuple(a for a in mesh_axes(split) if a in ROWS)) for d, split in enumerate(spec)]
    return [(d, axes) for d, axes in found if axes]
