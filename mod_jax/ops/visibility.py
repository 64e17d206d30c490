"""The rule of packed rows: which position attends to which.

Axes: B rows, S query positions, T key positions.
"""

import jax
import jax.numpy as jnp

from mod_jax.batch import Array


def visible(
    segment_ids: Array,
    branch_ids: Array,
    key_segment_ids: Array | None = None,
    key_branch_ids: Array | None = None,
    start: int | jax.Array = 0,
) -> jax.Array:
    """Attention mask of packed rows.

    A position attends to the positions that are not after it, lie in its segment, and belong to the
    shared prefix or to its own branch.

    Args:
      segment_ids: i32[B,S]. 0 is padding, which attends to nothing and is attended by nothing.
      branch_ids: i32[B,S]. 0 is the prefix that both branches share.
      key_segment_ids, key_branch_ids: i32[B,T], if the keys are not the queries' own positions but
        those of a cache.
      start: i32[], index of the first query among the keys.

    Returns:
      bool[B,S,T], True where the query attends to the key.
    """
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    key_branch_ids = branch_ids if key_branch_ids is None else key_branch_ids
    query_segment = segment_ids[:, :, None]
    query_branch = branch_ids[:, :, None]
    key_segment = key_segment_ids[:, None, :]
    key_branch = key_branch_ids[:, None, :]
    key_positions = jnp.arange(key_segment.shape[2])[None, :]
    query_positions = jnp.arange(query_segment.shape[1])[:, None] + start
    return (
        (key_positions <= query_positions)
        & (query_segment == key_segment)
        & (query_segment > 0)
        & ((key_branch == 0) | (key_branch == query_branch))
    )
