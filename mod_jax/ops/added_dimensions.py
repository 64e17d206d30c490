"""What attention kernels without segments or branches need: numbers added to each head.

Axes: B rows, S positions, N query heads, K key/value heads, H head size.

A key says in the added dimensions what it is, and a query has `FORBIDDEN` in those of what it must
not see. Their products lower the scores of such keys so far that their weights are 0, forward and
backward, and leave all others as they are. So no kernel needs a mask with two axes of positions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mod_jax.batch import Array
from mod_jax.sharding import ROWS, partition

BRANCHES = 2  # beside the shared prefix
FORBIDDEN = -(2.0**20)  # exact in bfloat16


def of_branches(branch_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers [B,S,n] of queries and of keys that forbid foreign branches.

    Args:
      branch_ids: i32[B,S], at most `BRANCHES`.
    """
    is_of_b = branch_ids[..., None] == jnp.arange(1, BRANCHES + 1)
    return jnp.where(is_of_b, 0, FORBIDDEN), is_of_b.astype(jnp.float32)


def of_segments(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers [B,S,n] of queries and of keys that forbid other segments.

    Two numbers differ if any of their binary digits does: each digit takes two dimensions.

    Args:
      segment_ids: i32[B,S], at most S.
    """
    digits = jnp.arange(segment_ids.shape[1].bit_length())
    is_one = (segment_ids[..., None] >> digits & 1).astype(jnp.float32)
    foreign = jnp.concatenate([is_one, 1 - is_one], axis=-1) * FORBIDDEN
    return foreign, jnp.concatenate([1 - is_one, is_one], axis=-1)


def with_dimensions(x: jax.Array, numbers: list[jax.Array], multiple: int = 1) -> jax.Array:
    """Adds numbers [B,S,n] to each head of f[B,S,N,H], and zeros up to a multiple of dimensions."""
    added = jnp.concatenate(numbers, axis=-1)
    missing = -(x.shape[-1] + added.shape[-1]) % multiple
    added = jnp.pad(added, ((0, 0), (0, 0), (0, missing)))
    more = jnp.broadcast_to(added[:, :, None], (*x.shape[:3], added.shape[-1]))
    return jnp.concatenate([x, more.astype(x.dtype)], axis=-1)


def each_device(
    attend: Callable,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: tuple[Array, Array] | None,
) -> jax.Array:
    """Calls `attend`; under the ambient mesh, with each device's own rows and heads.

    Args:
      attend: (query, key, value, rows) -> f[B,S,N,H].
      query: f[B,S,N,H].
      key, value: f[B,S,K,H].
      rows: (segment_ids, branch_ids), each i32[B,S], or None.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # A query head needs its key/value head, so both are split or neither.
        by_head = PartitionSpec(ROWS, None, *partition(mesh, key.shape[2:3], ("kv_heads",)))
        attend = jax.shard_map(
            attend,
            in_specs=(by_head, by_head, by_head, PartitionSpec(ROWS)),
            out_specs=by_head,
            check_vma=False,
        )
    return attend(query, key, value, rows)
