"""Attention of rows by tokamax's kernels, for NVIDIA GPUs.

Axes: B rows, S positions, N query heads, K key/value heads, H head size.

Of what decides which keys a query sees, both kernels know the order of positions alone ("triton"
would take all else as a mask with two axes of positions). Segments and branches take dimensions
that are added to each head (`added_dimensions`): 26 for rows of 2048, so a head of 128 becomes one
of 192 in the products of queries and keys.
"""

import functools

import jax
import jax.numpy as jnp

from mod_jax.batch import Array
from mod_jax.ops.added_dimensions import each_device, of_branches, of_segments, with_dimensions
from mod_jax.ops.nvidia import tokamax

HEAD_MULTIPLE = 64  # to which the backward pass of "mosaic" would pad
MULTIPLE = 8  # of the positions that "mosaic" takes
KERNELS = ("mosaic", "triton")  # Hopper's and Blackwell's own instructions; else the other one


def tokamax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: tuple[Array, Array] | None,
    kernels: tuple[str, ...] = KERNELS,
) -> jax.Array:
    """Softmax attention among the positions of each row; softmax and sums in float32.

    Under the ambient mesh each device computes its own rows and heads.

    Args:
      query: f[B,S,N,H].
      key, value: f[B,S,K,H]. Query head n reads key/value head n // (N // K).
      rows: (segment_ids, branch_ids), each i32[B,S], which decide as in `visible` what a query
        sees, with segments of at most S and branches of at most 2; None lets every query see all
        positions.
      kernels: Implementations of `tokamax.dot_product_attention`; the first that can is taken.

    Returns:
      f[B,S,N,H] in the dtype of `query`. Padding sees padding.

    Raises:
      ConfigError: If tokamax is not installed.
    """
    # equivalent to: attention_oracle(query, key, value, visible(*rows)) outside the padding
    return each_device(functools.partial(_on_device, kernels), query, key, value, rows)


def _on_device(
    kernels: tuple[str, ...],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """`tokamax_attention` of this device's rows and heads."""
    count, length, _, size = query.shape
    if rows is not None:
        segment_ids, branch_ids = rows
        foreign, own = zip(of_segments(segment_ids), of_branches(branch_ids), strict=True)
        query = with_dimensions(query, list(foreign), HEAD_MULTIPLE)
        key = with_dimensions(key, list(own), HEAD_MULTIPLE)
    padding = -length % MULTIPLE
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value)
    )
    out = tokamax().dot_product_attention(
        query,
        key,
        value,
        scale=size**-0.5,
        is_causal=rows is not None,
        key_value_seq_lengths=jnp.full(count, length) if rows is None and padding else None,
        implementation=kernels,
    )
    return out[:, :length]
