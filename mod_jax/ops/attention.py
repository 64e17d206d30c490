"""Grouped-query attention under the visibility rule of packed rows, and its oracle.

Axes: B rows, S query positions, T key positions, N query heads, K key/value heads (N a multiple of K), H head size.
"""

import jax
import jax.numpy as jnp


def visible(
    segment_ids, branch_ids, key_segment_ids=None, key_branch_ids=None, start=0
) -> jax.Array:
    """Which keys a position sees: those not after it, in its segment, on the shared prefix or its own branch.

    Args:
      segment_ids: i32[B,S], 0 is padding: it sees nothing and nothing sees it.
      branch_ids: i32[B,S], 0 is the prefix that both branches share.
      key_segment_ids, key_branch_ids: i32[B,T] where the keys are not the queries (a cache).
      start: i32[], the place of the first query among the keys.
    Returns:
      bool[B,S,T].
    """
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    key_branch_ids = branch_ids if key_branch_ids is None else key_branch_ids
    query_segment, query_branch = segment_ids[:, :, None], branch_ids[:, :, None]
    key_segment, key_branch = key_segment_ids[:, None, :], key_branch_ids[:, None, :]
    not_after = (
        jnp.arange(key_segment.shape[2])[None, :]
        <= jnp.arange(query_segment.shape[1])[:, None] + start
    )
    return (
        not_after
        & (query_segment == key_segment)
        & (query_segment > 0)
        & ((key_branch == 0) | (key_branch == query_branch))
    )


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Softmax attention; logits and softmax are float32.

    Args:
      query: f[B,S,N,H].
      key, value: f[B,T,K,H]; query head n reads key head n // (N // K).
      mask: bool[B,S,T] from `visible`; None shows every key. A position that sees nothing averages all values: finite, with finite
        gradients, and of no meaning.
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
    """`attention`, one head after the other, everything in float32."""
    query32, key32, value32 = (a.astype(jnp.float32) for a in (query, key, value))
    group = query.shape[2] // key.shape[2]
    heads = []
    for n in range(query.shape[2]):
        logits = (
            jnp.einsum("bsh,bth->bst", query32[:, :, n], key32[:, :, n // group])
            / query.shape[3] ** 0.5
        )
        weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)
        heads.append(jnp.einsum("bst,bth->bsh", weights, value32[:, :, n // group]))
    return jnp.stack(heads, axis=2).astype(query.dtype)
