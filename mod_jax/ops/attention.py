"""Grouped-query attention in packed rows, in pictures and on a cache, and a slow oracle.

Axes: B rows, S query positions, T key positions, N query heads, K key/value heads (N is a multiple
of K), H head size.
"""

import jax
import jax.numpy as jnp

from mod_jax.batch import Array
from mod_jax.ops.blocked_attention import blocked_attention
from mod_jax.ops.splash_attention import splash_attention
from mod_jax.ops.tokamax_attention import tokamax_attention
from mod_jax.sharding import platform

IMPLEMENTATIONS = {
    "blocked": blocked_attention,
    "splash": splash_attention,
    "tokamax": tokamax_attention,
}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: Array | None = None,
    branch_ids: Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention among the positions of each row, without an array [.., S, S] in any pass.

    Args:
      query: f[B,S,N,H].
      key, value: f[B,S,K,H]. Query head n reads key/value head n // (N // K).
      segment_ids, branch_ids: i32[B,S], which decide as in `visible` what a query sees. Without
        them every query sees every key of its row.
      implementation: A key of `IMPLEMENTATIONS`. By default "splash" for TPUs, "tokamax" for heads
        of 16 bits on GPUs and "blocked" for everything else. The platform is that of the ambient
        mesh, or else of the default device: a choice inside the program
        (`jax.lax.platform_dependent`) would keep what the backward passes of both need.

    Returns:
      f[B,S,N,H] in the dtype of `query`; scores, softmax and sums are float32. What a padding
      position gets has no meaning, but is finite and has finite gradients.

    Raises:
      ConfigError: If tokamax is needed and not installed.
    """
    # equivalent to: attention_oracle(query, key, value, visible(segment_ids, branch_ids))
    rows = None if segment_ids is None or branch_ids is None else (segment_ids, branch_ids)
    if implementation is None:
        implementation = _default(query.dtype)
    return IMPLEMENTATIONS[implementation](query, key, value, rows)


def _default(dtype: jnp.dtype) -> str:
    kernels = {"tpu": "splash"}
    if dtype.itemsize == 2:  # Triton takes a minute to compile heads of float32
        kernels["gpu"] = "tokamax"
    return kernels.get(platform(), "blocked")


def attention_to(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention to keys of any number, such as those of a cache.

    All scores are held at once: few queries at a time, or short rows.

    Args:
      query: f[B,S,N,H].
      key, value: f[B,T,K,H]. Query head n reads key/value head n // (N // K).
      mask: bool[B,S,T] from `visible`. A position without any key gets the mean of all values,
        which has no meaning but is finite and has finite gradients.

    Returns:
      f[B,S,N,H] in the dtype of `query`.
    """
    # equivalent to: attention_oracle(query, key, value, mask)
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


def attention_oracle(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """`attention_to` computed one head after the other, all in float32."""
    query32, key32, value32 = (a.astype(jnp.float32) for a in (query, key, value))
    group = query.shape[2] // key.shape[2]
    heads = []
    for n in range(query.shape[2]):
        products = jnp.einsum("bsh,bth->bst", query32[:, :, n], key32[:, :, n // group])
        logits = products / query.shape[3] ** 0.5
        weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)
        heads.append(jnp.einsum("bst,bth->bsh", weights, value32[:, :, n // group]))
    return jnp.stack(heads, axis=2).astype(query.dtype)
