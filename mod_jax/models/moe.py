"""The sparse feed-forward layer: a float32 router over SwiGLU experts (method: MoE; DeepSpeed-MoE, arXiv 2201.05596, for capacity and residual).

Axes: B rows, S positions, N = B * S tokens, D width, F feed-forward, E experts, K choices a token.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from mod_jax.config import DecoderConfig, MoEConfig
from mod_jax.models.feed_forward import FeedForward
from mod_jax.models.parameters import constant, uniform, weight
from mod_jax.ops.expert_exchange import expert_layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
    """What a sparse layer reports.

    Attributes:
      balance: f32[], E * sum_e mean(p_e) * mean(the first choice is e), means over the valid tokens; 1 when both are even.
      z: f32[], mean over the valid tokens of logsumexp(logits)^2.
      load: f32[E], (token, choice) pairs that each expert receives, after drops.
    """

    balance: jax.Array
    z: jax.Array
    load: jax.Array


class MoE(nnx.Module):
    """A sparse layer, or a stack of them."""

    def __init__(self, config: DecoderConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        self.config = config.moe
        D, F, E = config.hidden_size, config.intermediate_size, config.moe.num_experts
        self.router = nnx.Dict(w_de=uniform(rngs, stack, (D, E), (None, None), D**-0.5))
        self.experts = nnx.Dict(
            gate=nnx.Dict(
                w_edf=weight(rngs, stack, (E, D, F), ("expert", "expert_embed", "mlp"), D**-0.5)
            ),
            up=nnx.Dict(
                w_edf=weight(rngs, stack, (E, D, F), ("expert", "expert_embed", "mlp"), D**-0.5)
            ),
            down=nnx.Dict(
                w_efd=weight(rngs, stack, (E, F, D), ("expert", "mlp", "expert_embed"), F**-0.5)
            ),
        )
        if config.moe.residual:
            self.residual = FeedForward(config, stack, rngs)
            self.residual.mix = nnx.Dict(
                w_d2=constant(stack, (D, 2), ("embed", None), 0.0),
                b_2=constant(stack, (2,), (None,), 0.0),
            )

    def __call__(self, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, MoEAux]:
        """One layer (a stack is sliced first).

        Args:
          x: f[B,S,D].
          valid: bool[B,S]; other tokens are padding: not routed, counted in no loss, and their output is 0.
        Returns:
          f[B,S,D] in x's dtype, and the layer's report.
        """
        logits = _float32_matmul(x, self.router.w_de[...])
        choices, weights, kept = route(logits, valid, self.config)
        experts = (
            self.experts.gate.w_edf[...],
            self.experts.up.w_edf[...],
            self.experts.down.w_efd[...],
        )
        y = expert_layer(x, jnp.where(kept, choices, self.config.num_experts), weights, *experts)
        if self.config.residual:
            mix = jax.nn.softmax(
                _float32_matmul(x, self.residual.mix.w_d2[...]) + self.residual.mix.b_2[...]
            )
            mixed = mix[..., :1] * y + mix[..., 1:] * self.residual(x)
            y = jnp.where(valid[..., None], mixed, 0).astype(x.dtype)
        return y, report(logits, choices, kept, valid)


def route(
    logits: jax.Array, valid: jax.Array, config: MoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The K most probable experts of each token.

    Args:
      logits: f32[B,S,E].
      valid: bool[B,S].
    Returns:
      choices i32[B,S,K], most probable first; weights f32[B,S,K], their probabilities renormalised over what is kept, 0 elsewhere;
      kept bool[B,S,K], False for padding and over capacity.
    """
    probabilities, choices = jax.lax.top_k(jax.nn.softmax(logits), config.experts_per_token)
    kept = jnp.broadcast_to(valid[..., None], choices.shape)
    if config.capacity_factor is not None:
        places = math.ceil(
            config.experts_per_token * config.capacity_factor * valid.size / config.num_experts
        )
        kept = kept & within_capacity(choices, valid, config.num_experts, places)
    weights = jnp.where(kept, probabilities, 0)
    total = weights.sum(-1, keepdims=True)
    return choices, weights / jnp.where(total > 0, total, 1), kept


def within_capacity(
    choices: jax.Array, valid: jax.Array, num_experts: int, places: int
) -> jax.Array:
    """bool[B,S,K]: which choices i32[B,S,K] find a place if an expert has `places`: all first choices before all second, in token order."""
    in_order = choices.reshape(-1, choices.shape[-1]).T.reshape(-1)
    asked = (
        jax.nn.one_hot(in_order, num_experts, dtype=jnp.int32)
        * jnp.tile(valid.reshape(-1), choices.shape[-1])[:, None]
    )
    place = jnp.take_along_axis(jnp.cumsum(asked, axis=0), in_order[:, None], axis=1)
    return (place <= places).reshape(choices.shape[-1], -1).T.reshape(choices.shape)


def report(logits: jax.Array, choices: jax.Array, kept: jax.Array, valid: jax.Array) -> MoEAux:
    """Losses and load of one layer, from what `route` takes and returns."""
    E, count = logits.shape[-1], jnp.maximum(valid.sum(), 1)

    def mean(values):
        return (
            jnp.einsum("bs...,bs->...", values, valid.astype(jnp.float32), precision="highest")
            / count
        )

    balance = E * jnp.sum(mean(jax.nn.softmax(logits)) * mean(jax.nn.one_hot(choices[..., 0], E)))
    z = mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
    load = jnp.sum(jax.nn.one_hot(choices, E) * kept[..., None], axis=(0, 1, 2))
    return MoEAux(balance, z, load)


def _float32_matmul(x, w):
    """Decides, so without the TPU's default of bfloat16 factors."""
    return jnp.einsum("bsd,dn->bsn", x.astype(jnp.float32), w, precision="highest")
