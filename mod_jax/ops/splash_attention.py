"""Attention of rows by JAX's splash attention, a Pallas kernel for TPUs.

Axes: B rows, S positions, N query heads, K key/value heads, H head size.

The kernel knows a static mask and segments, no branches. Those take two dimensions that are added
to each head (`added_dimensions`). A head of 64 fits into the 128 lanes of a TPU with them; one of
128 takes twice the lanes in the products of queries and keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from mod_jax.batch import Array
from mod_jax.ops.added_dimensions import each_device, of_branches, with_dimensions
from mod_jax.ops.blocked_attention import SAVED, equal_blocks

BLOCK = 512  # positions; a row is cut into equal blocks of at most so many
LANES = 128  # of a TPU, of which a block is a multiple


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: tuple[Array, Array] | None,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention among the positions of each row; softmax and sums in float32.

    Under the ambient mesh each device computes its own rows and heads.

    Args:
      query: f[B,S,N,H].
      key, value: f[B,S,K,H]. Query head n reads key/value head n // (N // K).
      rows: (segment_ids, branch_ids), each i32[B,S], which decide as in `visible` what a query
        sees, with branches of at most 2; None lets every query see all positions.
      interpret: Runs the kernel without a TPU, slowly.

    Returns:
      f[B,S,N,H] in the dtype of `query`. Padding sees padding.
    """
    # equivalent to: attention_oracle(query, key, value, visible(*rows)) outside the padding
    return each_device(functools.partial(_on_device, interpret), query, key, value, rows)


def _on_device(
    interpret: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """`splash_attention` of this device's rows and heads."""
    length, heads, size = query.shape[1:]
    query = (query.astype(jnp.float32) * size**-0.5).astype(query.dtype)
    if rows is None:
        segment_ids = jnp.ones(query.shape[:2], jnp.int32)
    else:
        segment_ids, branch_ids = rows
        foreign, own = of_branches(branch_ids)
        query, key = with_dimensions(query, [foreign]), with_dimensions(key, [own])

    block, padding = equal_blocks(length, BLOCK, LANES)
    query, key, value, segment_ids = (
        jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        for x in (query, key, value, segment_ids)
    )
    mask = (masks.FullMask if rows is None else masks.CausalMask)((length + padding,) * 2)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    by_row = jax.vmap(lambda *heads, ids: attend(*heads, kernel.SegmentIds(ids, ids)))
    out = by_row(*(x.swapaxes(1, 2) for x in (query, key, value)), ids=segment_ids)
    return out.swapaxes(1, 2)[:, :length]
