"""Looks up rows of a table that is split over devices, without ever holding it whole.

Axes: B rows, S positions, V vocabulary, D width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mod_jax.batch import Array
from mod_jax.sharding import AXES, ROWS, mesh_axes, partition


def lookup(table_vd: jax.Array, tokens: Array, dtype: str) -> jax.Array:
    """Rows of an embedding table.

    Args:
      table_vd: f32[V,D], with the logical axes ("vocab", "embed"). Its gradient is summed in its
        own dtype.
      tokens: i32[B,S], below V. Under an ambient mesh, B is a multiple of the devices that rows are
        split over.
      dtype: Of the result.

    Returns:
      f[B,S,D].
    """
    # equivalent to: table_vd[tokens].astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _rows(table_vd, jnp.asarray(tokens)).astype(dtype)
    spec = partition(mesh, table_vd.shape, ("vocab", "embed"))
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

    Devices that hold other columns read theirs for these tokens, and send them: the tokens of all
    are gathered, and an exchange trades columns of all rows for all columns of one's own. So what
    travels is as large as the result, and not as the table.

    Args:
      vocab, embed: Mesh axes over which the two dimensions of the table are split.
      dtype: Of the result.
      table_vd: This device's words and columns.
      tokens: i32[b,S].
    """
    others = tuple(axis for axis in AXES if axis not in vocab + embed)
    tokens = jax.lax.pcast(tokens, vocab, to="varying") if vocab else tokens
    table_vd = jax.lax.pcast(table_vd, tuple(axis for axis in others if axis in ROWS), to="varying")
    if embed:
        tokens = jax.lax.all_gather(tokens, embed, tiled=True)
    if vocab:
        words = len(table_vd)
        own = tokens - jax.lax.axis_index(vocab) * words
        mine = (own >= 0) & (own < words)
        found = jnp.where(mine[..., None], _rows(table_vd, own), 0)
        found = jax.lax.psum(found.astype(dtype), vocab)  # of which one is not 0
    else:
        found = _rows(table_vd, tokens).astype(dtype)
    return jax.lax.all_to_all(found, embed, 0, 2, tiled=True) if embed else found
