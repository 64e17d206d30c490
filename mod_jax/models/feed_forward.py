"""The dense feed-forward layer: SwiGLU.

Axes: D width, F width of the feed-forward layer.
"""

import jax
from flax import nnx

from mod_jax.config import DecoderConfig
from mod_jax.models.parameters import weight
from mod_jax.ops.linear import linear


def swiglu(
    x: jax.Array, gate_w_df: jax.Array, up_w_df: jax.Array, down_w_fd: jax.Array
) -> jax.Array:
    """down(silu(gate(x)) * up(x)), the feed-forward layer of Qwen and Llama (hidden_act "silu").

    Args:
      x: f[..., D].
      gate_w_df, up_w_df: f[D,F], cast to the dtype of `x`.
      down_w_fd: f[F,D], cast to the dtype of `x`.

    Returns:
      f[..., D] in the dtype of `x`.
    """
    gate = jax.nn.silu(linear(x, gate_w_df))
    return linear(gate * linear(x, up_w_df), down_w_fd)


class FeedForward(nnx.Module):
    """One SwiGLU layer, or a stack of them."""

    def __init__(self, config: DecoderConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate = nnx.Dict(w_df=weight(rngs, stack, (D, F), ("embed", "mlp"), D**-0.5))
        self.up = nnx.Dict(w_df=weight(rngs, stack, (D, F), ("embed", "mlp"), D**-0.5))
        self.down = nnx.Dict(w_fd=weight(rngs, stack, (F, D), ("mlp", "embed"), F**-0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies one layer (a stack is sliced first): f[..., D] -> f[..., D], same dtype."""
        return swiglu(x, self.gate.w_df[...], self.up.w_df[...], self.down.w_fd[...])
