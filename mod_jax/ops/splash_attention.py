"""Attention of rows by JAX's splash attention, a Pallas kernel for TPUs.

Axes: B rows, S positions, N query heads, K key/value heads, H head size.

The kernel knows a static mask and segments, no branches. So two dimensions are added to each head,
one per branch: a key has 1 in the dimension of its branch, and a query has `FORBIDDEN` in those of
the branches that it is not in. Their products lower the scores of foreign branches so far that
their weights are 0, forward and backward, and leave all others as they are. A head of 64 fits into
the 128 lanes of a TPU with them; one of 128 takes twice the lanes in the products of queries and
keys.
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
from jax.sharding import PartitionSpec

from mod_jax.batch import Array
from mod_jax.ops.blocked_attention import SAVED
from mod_jax.sharding import ROWS, RULES

BLOCK = 512  # positions; a row is cut into equal blocks of at most so many
LANES = 128  # of a TPU, of which a block is a multiple
BRANCHES = 2  # beside the shared prefix
FORBIDDEN = -(2.0**20)  # exact in bfloat16


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
    causal = rows is not None
    if rows is None:
        ids = query.shape[:2]
        rows = (jnp.ones(ids, jnp.int32), jnp.zeros(ids, jnp.int32))
    on_device = functools.partial(_on_device, causal, interpret)
    if not jax.sharding.get_abstract_mesh().empty:
        by_head = PartitionSpec(ROWS, None, RULES["heads"])
        by_row = PartitionSpec(ROWS)
        on_device = jax.shard_map(
            on_device,
            in_specs=(by_head, by_head, by_head, by_row, by_row),
            out_specs=by_head,
            check_vma=False,
        )
    segment_ids, branch_ids = map(jnp.asarray, rows)
    return on_device(query, key, value, segment_ids, branch_ids)


def _on_device(
    causal: bool,
    interpret: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    branch_ids: jax.Array,
) -> jax.Array:
    """`splash_attention` of this device's rows and heads."""
    length, heads, size = query.shape[1:]
    query = (query.astype(jnp.float32) * size**-0.5).astype(query.dtype)
    if causal:
        is_of_b = branch_ids[..., None] == jnp.arange(1, BRANCHES + 1)
        query = _with_dimensions(query, jnp.where(is_of_b, 0, FORBIDDEN))
        key = _with_dimensions(key, is_of_b)

    blocks = -(-length // BLOCK)
    block = -(-length // (blocks * LANES)) * LANES
    padding = blocks * block - length
    query, key, value, segment_ids = (
        jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        for x in (query, key, value, segment_ids)
    )
    mask = (masks.CausalMask if causal else masks.FullMask)((blocks * block,) * 2)
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


def _with_dimensions(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """Appends numbers [B,S,n] to each head of f[B,S,N,H]."""
    more = jnp.broadcast_to(numbers[:, :, None], (*x.shape[:3], numbers.shape[-1]))
    return jnp.concatenate([x, more.astype(x.dtype)], axis=-1)
