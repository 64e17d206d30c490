"""Looks up rows of a table that is split over devices, without ever holding it whole.

Axes: B rows, S positions, V vocabulary, D width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mod_jax.batch import Array
from mod_jax.sharding import ROWS, ambient_mesh, mesh_axes, partition, varying

TABLE_AXES = ("vocab", "word_embed")  # logical axes of a table's dimensions


def lookup(table_vd: jax.Array, tokens: Array, dtype: str) -> jax.Array:
    """Rows of an embedding table.

    Args:
      table_vd: f32[V,D], with the logical axes `TABLE_AXES`. Its gradient is summed in its own
        dtype.
      tokens: i32[B,S], below V. Under an ambient mesh, B is a multiple of the devices that rows are
        split over.
      dtype: Of the result.

    Returns:
      f[B,S,D].
    """
    # equivalent to: table_vd[tokens].astype(dtype)
    mesh = ambient_mesh()
    if mesh is None:
        return _rows(table_vd, jnp.asarray(tokens)).astype(dtype)
    spec = partition(mesh, table_vd.shape, TABLE_AXES)
    vocab, embed = map(mesh_axes, spec)
    body = functools.partial(_on_device, vocab, embed, dtype)
    rows = PartitionSpec(ROWS)
    return jax.shard_map(body, in_specs=(spec, rows), out_specs=rows)(table_vd, jnp.asarray(tokens))


def _rows(table_vd: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take(table_vd, tokens, axis=0, mode="clip")


def _on_device(
    vocab: tuple[str, ...],
    embed: tuple[str, ...],
    dtype: str,
    table_vd: jax.Array,
    tokens: jax.Array,
) -> jax.Array:
    """`lookup` of this device's rows.

    Each device reads its words and columns for the rows of all that it shares the table with; they
    sum over the words, of which one is not 0, and trade columns of all rows for all columns of
    their own. So what travels goes by the size of the result, and not of the table.

    Args:
      vocab, embed: Mesh axes over which the two dimensions of the table are split.
      dtype: Of the result.
      table_vd: This device's words and columns.
      tokens: i32[b,S].
    """
    tokens = varying(tokens, tuple(axis for axis in vocab if axis not in ROWS))
    table_vd = varying(table_vd, tuple(axis for axis in ROWS if axis not in vocab + embed))
    readers = tuple(axis for axis in vocab if axis in ROWS)
    for axis in readers + embed:  # tokens of [embed, readers, b]
        tokens = jax.lax.all_gather(tokens, axis, tiled=True)
    if vocab:
        words = len(table_vd)
        own = tokens - jax.lax.axis_index(vocab) * words
        found = jnp.where(((own >= 0) & (own < words))[..., None], _rows(table_vd, own), 0)
    else:
        found = _rows(table_vd, tokens)
    found = found.astype(dtype)
    for axis in vocab:
        if axis in ROWS:
            parts = jax.lax.axis_size(embed) if embed else 1
            found = found.reshape(parts, -1, *found.shape[1:])
            found = jax.lax.psum_scatter(found, axis, scatter_dimension=1, tiled=True)
            found = found.reshape(-1, *found.shape[2:])
        else:
            found = jax.lax.psum(found, axis)
    return jax.lax.all_to_all(found, embed, 0, 2, tiled=True) if embed else found
