"""Attention as a loop over pairs of blocks, which never holds the scores of a whole row.

Axes: B rows, S positions, N query heads, K key/value heads, G query heads of a key/value head, H
head size, q positions of a block of queries, t of a block of keys (as many).

Source: FlashAttention-2 (arXiv 2307.08691), in plain JAX. Each step of the loop reads one block of
queries and one block of keys, and updates the running maximum, sum and output of these queries.
Pairs whose keys all come after the queries are left out. The backward pass makes the scores of a
pair again from the log-sum of each query. So the largest array of either pass is a block of scores,
f32[B,K,G,q,t], which the caches of a processor hold; scaling, masking and exponential of a block
are one pass over it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mod_jax.batch import Array
from mod_jax.ops.visibility import visible

Rows = tuple[jax.Array, jax.Array]  # (segment_ids, branch_ids), each i32[B,S]

BLOCK = 128  # positions; a row is cut into equal blocks of at most so many
MULTIPLE = 8  # of the positions of a block
SAVED = "attention"  # name of what the backward pass reads, for policies of `jax.checkpoint`
LOWEST = float(jnp.finfo(jnp.float32).min)
SMALLEST = float(jnp.finfo(jnp.float32).tiny)


def blocked_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, rows: tuple[Array, Array] | None
) -> jax.Array:
    """Softmax attention among the positions of each row; softmax and sums in float32.

    Args:
      query: f[B,S,N,H].
      key, value: f[B,S,K,H]. Query head n reads key/value head n // (N // K).
      rows: (segment_ids, branch_ids), each i32[B,S], which decide as in `visible` what a
        query sees; None lets every query see all positions.

    Returns:
      f[B,S,N,H] in the dtype of `query`; 0, with gradients of 0, where a query sees nothing.
    """
    # equivalent to: attention_oracle(query, key, value, visible(*rows))
    length, kv_heads = key.shape[1:3]
    block, padding = equal_blocks(length, BLOCK, MULTIPLE)

    def pad(x: Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))

    bidirectional = rows is None
    if rows is None:
        # padding is of no segment, and no query sees it
        rows = (jnp.ones((1, length), jnp.int32), jnp.zeros((1, length), jnp.int32))
    out = _blocked(
        block,
        bidirectional,
        _by_head(pad(query), kv_heads),
        pad(key).swapaxes(1, 2),
        pad(value).swapaxes(1, 2),
        (pad(rows[0]), pad(rows[1])),
    )
    return out.transpose(0, 3, 1, 2, 4).reshape(len(query), -1, *query.shape[2:])[:, :length]


def equal_blocks(length: int, largest: int, multiple: int) -> tuple[int, int]:
    """(positions of a block, padding of the row) that cut a row into as few blocks as may be."""
    blocks = -(-length // largest)
    block = -(-length // (blocks * multiple)) * multiple
    return block, blocks * block - length


def _by_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """f[B,S,N,H] -> f[B,K,G,S,H]."""
    rows, length, heads, size = x.shape
    return x.reshape(rows, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)


def _pairs(blocks: int, bidirectional: bool) -> np.ndarray:
    """i32[pairs,2]: (number of the queries' block, number of the keys' block)."""
    seen = np.ones((blocks, blocks), bool)
    return np.argwhere(seen if bidirectional else np.tril(seen)).astype(np.int32)


def _grouped(x: jax.Array) -> jax.Array:
    """f[B,K,G,q,n] -> f[B,K,G*q,n]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _part(x: jax.Array, number: jax.Array, block: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, number * block, block, axis)


def _put(x: jax.Array, part: jax.Array, number: jax.Array, block: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, number * block, axis)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _scores(
    block: int,
    bidirectional: bool,
    query_q: jax.Array,
    key_t: jax.Array,
    rows: Rows,
    pair: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The scaled scores f32[B,K,G,q,t] of a pair of blocks, and which of them count."""
    i, j = pair
    segments_q, branches_q = (_part(ids, i, block, 1) for ids in rows)
    segments_t, branches_t = (_part(ids, j, block, 1) for ids in rows)
    if bidirectional:
        mask = segments_t[:, None] > 0
    else:
        mask = visible(segments_q, branches_q, segments_t, branches_t, (i - j) * block)
    scores = _product("bkgqh,bkth->bkgqt", query_q, key_t)
    return scores * query_q.shape[-1] ** -0.5, mask[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(
    block: int,
    bidirectional: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: Rows,
) -> jax.Array:
    """`blocked_attention` of f[B,K,G,S,H] and f[B,K,S,H], where S is a multiple of `block`."""
    return _forward(block, bidirectional, query, key, value, rows)[0]


def _forward(
    block: int,
    bidirectional: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: Rows,
):
    def step(carry, pair):
        i, j = pair
        out_q, highest_q, total_q = (_part(x, i, block, 3) for x in carry)
        key_t, value_t = (_part(x, j, block, 2) for x in (key, value))
        scores, mask = _scores(block, bidirectional, _part(query, i, block, 3), key_t, rows, pair)
        scores = jnp.where(mask, scores, LOWEST)
        highest = jnp.maximum(highest_q, scores.max(-1))
        weights = jnp.where(mask, jnp.exp(scores - highest[..., None]), 0)
        kept = jnp.exp(highest_q - highest)
        values = _product("bkgqt,bkth->bkgqh", weights.astype(value.dtype), value_t)
        new = (out_q * kept[..., None] + values, highest, total_q * kept + weights.sum(-1))
        return tuple(_put(x, part, i, block, 3) for x, part in zip(carry, new)), None

    start = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full(query.shape[:-1], LOWEST),
        jnp.zeros(query.shape[:-1]),
    )
    pairs = _pairs(query.shape[3] // block, bidirectional)
    (out, highest, total), _ = jax.lax.scan(step, start, pairs)
    total = jnp.maximum(total, SMALLEST)  # 0 where a query sees nothing
    # Kept in float32: rounded, it would cost the gradient of bfloat16 queries a digit.
    out = checkpoint_name(out / total[..., None], SAVED)
    log_sum = checkpoint_name(highest + jnp.log(total), SAVED)
    return out.astype(query.dtype), (query, key, value, rows, out, log_sum)


def _backward(block: int, bidirectional: bool, saved: tuple, d_out: jax.Array):
    query, key, value, rows, out, log_sum = saved
    inner = jnp.sum(out * d_out.astype(jnp.float32), axis=-1)

    def step(carry, pair):
        i, j = pair
        query_q, d_out_q, log_sum_q, inner_q = (
            _part(x, i, block, 3) for x in (query, d_out, log_sum, inner)
        )
        key_t, value_t = (_part(x, j, block, 2) for x in (key, value))
        scores, mask = _scores(block, bidirectional, query_q, key_t, rows, pair)
        weights = jnp.where(mask, jnp.exp(scores - log_sum_q[..., None]), 0)
        d_weights = _product("bkgqh,bkth->bkgqt", d_out_q, value_t)
        d_scores = (weights * (d_weights - inner_q[..., None])).astype(query.dtype)
        # Sums over one dimension: a CPU would transpose the scores for a sum over g and q.
        d_scores, weights, query_q, d_out_q = map(
            _grouped, (d_scores, weights.astype(value.dtype), query_q, d_out_q)
        )
        d_query_q = _product("bknt,bkth->bknh", d_scores, key_t)
        added = (
            (d_query_q.reshape(*query.shape[:3], block, -1), i, 3),
            (_product("bknt,bknh->bkth", d_scores, query_q), j, 2),
            (_product("bknt,bknh->bkth", weights, d_out_q), j, 2),
        )
        sums = (
            _put(x, _part(x, number, block, axis) + part, number, block, axis)
            for x, (part, number, axis) in zip(carry, added)
        )
        return tuple(sums), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    pairs = _pairs(query.shape[3] // block, bidirectional)
    (d_query, d_key, d_value), _ = jax.lax.scan(step, start, pairs)
    scale = query.shape[-1] ** -0.5
    d_query, d_key = d_query * scale, d_key * scale
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
    )


_blocked.defvjp(_forward, _backward)
