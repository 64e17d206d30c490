"""Grouped-query attention, the visibility rule of packed rows, and a slow oracle.

Axes: B rows, S query positions, T key positions, N query heads, K key/value heads (N is a multiple
of K), H head size.
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


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Softmax attention, with logits and softmax in float32.

    Args:
      query: f[B,S,N,H].
      key, value: f[B,T,K,H]. Query head n reads key/value head n // (N // K).
      mask: bool[B,S,T] from `visible`; None attends to every key. A position without any key gets
        the mean of all values, which has no meaning but is finite and has finite gradients.

    Returns:
      f[B,S,N,H] in the dtype of `query`.
    """
    # equivalent to: attention_oracle(query, key, value, mask)
    return jax.nn.dot_product_attention(
        query, key, value, mask=None if mask is None else mask[:, None]
    )


def attention_oracle(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """`attention` computed one head after the other, all in float32."""
    query32, key32, value32 = (a.astype(jnp.float32) for a in (query, key, value))
    group = query.shape[2] // key.shape[2]
    heads = []
    for n in range(query.shape[2]):
        products = jnp.einsum("bsh,bth->bst", query32[:, :, n], key32[:, :, n // group])
        logits = products / query.shape[3] ** 0.5
        weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)
        heads.append(jnp.einsum("bst,bth->bsh", weights, value32[:, :, n // group]))
    return jnp.stack(heads, axis=2).astype(query.dtype)
