"""The dense feed-forward layer: SwiGLU.

Axes: D width, F width of the feed-forward layer.
"""

import jax
from flax import nnx

from mod_jax.config import DecoderConfig
from mod_jax.models.parameters import multiplied, weight


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)), the feed-forward layer of Qwen and Llama (hidden_act "silu").

    One layer, or a stack of them.
    """

    def __init__(self, config: DecoderConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate = nnx.Dict(w_df=weight(rngs, stack, (D, F), ("embed", "mlp"), D**-0.5))
        self.up = nnx.Dict(w_df=weight(rngs, stack, (D, F), ("embed", "mlp"), D**-0.5))
        self.down = nnx.Dict(w_fd=weight(rngs, stack, (F, D), ("mlp", "embed"), F**-0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies one layer (a stack is sliced first): f[..., D] -> f[..., D], same dtype."""
        gate = jax.nn.silu(multiplied(x, self.gate.w_df))
        return multiplied(gate * multiplied(x, self.up.w_df), self.down.w_fd)
