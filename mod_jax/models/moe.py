"""The sparse feed-forward layer: a float32 router over SwiGLU experts.

Sources: LLaVA-MoD (arXiv 2408.15881); for capacity and the residual expert DeepSpeed-MoE
(arXiv 2201.05596).

Axes: B rows, S positions, N = B * S tokens, D width, F width of the feed-forward layer, E experts,
K experts per token.
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
    """Router losses and expert load of a sparse layer.

    Attributes:
      balance: f32[], load-balance loss E * sum_e mean(p_e) * mean(the first choice is e), the means
        taken over the valid tokens. It is 1 if probabilities and first choices are spread evenly.
      z: f32[], router z-loss, the mean of logsumexp(logits)^2 over the valid tokens.
      load: f32[E], number of (token, choice) pairs that each expert processes, after drops.
    """

    balance: jax.Array
    z: jax.Array
    load: jax.Array


class ResidualExpert(FeedForward):
    """The expert that every token passes, and the projection that mixes it with the routed ones."""

    def __init__(self, config: DecoderConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        super().__init__(config, stack, rngs)
        self.mix = nnx.Dict(
            w_d2=constant(stack, (config.hidden_size, 2), (None, None), 0.0),
            b_2=constant(stack, (2,), (None,), 0.0),
        )


class MoE(nnx.Module):
    """One sparse layer, or a stack of them."""

    def __init__(self, config: DecoderConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        if config.moe is None:
            raise ValueError("decoder.moe = None: expected a MoEConfig for a sparse layer.")
        self.config = config.moe
        D, F, E = config.hidden_size, config.intermediate_size, config.moe.num_experts
        in_axes = ("expert", "expert_embed", "mlp")
        out_axes = ("expert", "mlp", "expert_embed")
        self.router = nnx.Dict(w_de=uniform(rngs, stack, (D, E), (None, None), D**-0.5))
        self.experts = nnx.Dict(
            gate=nnx.Dict(w_edf=weight(rngs, stack, (E, D, F), in_axes, D**-0.5)),
            up=nnx.Dict(w_edf=weight(rngs, stack, (E, D, F), in_axes, D**-0.5)),
            down=nnx.Dict(w_efd=weight(rngs, stack, (E, F, D), out_axes, F**-0.5)),
        )
        if config.moe.residual:
            self.residual = ResidualExpert(config, stack, rngs)

    def __call__(self, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, MoEAux]:
        """Applies one layer (a stack is sliced first).

        Args:
          x: f[B,S,D].
          valid: bool[B,S]. The other tokens are padding: they are not routed, enter no loss, and
            their output is 0.

        Returns:
          f[B,S,D] in the dtype of `x`, and the layer's losses and load.
        """
        with jax.named_scope("router"):
            logits = _float32_matmul(x, self.router.w_de[...])
            choices, weights, kept = route(logits, valid, self.config)
        with jax.named_scope("experts"):
            experts = (
                self.experts.gate.w_edf[...],
                self.experts.up.w_edf[...],
                self.experts.down.w_efd[...],
            )
            kept_choices = jnp.where(kept, choices, self.config.num_experts)
            y = expert_layer(x, kept_choices, weights, *experts)
        if self.config.residual:
            with jax.named_scope("residual"):
                mix_logits = _float32_matmul(x, self.residual.mix.w_d2[...])
                mix = jax.nn.softmax(mix_logits + self.residual.mix.b_2[...])
                mixed = mix[..., :1] * y + mix[..., 1:] * self.residual(x)
                y = jnp.where(valid[..., None], mixed, 0).astype(x.dtype)
        return y, report(logits, choices, kept, valid)


def route(
    logits: jax.Array, valid: jax.Array, config: MoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses the K most probable experts of each token.

    Args:
      logits: f32[B,S,E].
      valid: bool[B,S], False for padding.
      config: Number of experts per token, their capacity, and whether weights sum to 1.

    Returns:
      choices: i32[B,S,K], experts, most probable first.
      weights: f32[B,S,K], probabilities of the kept choices, renormalised over them if
        `norm_topk_prob`; else 0.
      kept: bool[B,S,K], False for padding and for choices beyond an expert's capacity.
    """
    probabilities, choices = jax.lax.top_k(jax.nn.softmax(logits), config.experts_per_token)
    kept = jnp.broadcast_to(valid[..., None], choices.shape)
    if config.capacity_factor is not None:
        places = math.ceil(
            config.experts_per_token * config.capacity_factor * valid.size / config.num_experts
        )
        kept = kept & within_capacity(choices, valid, config.num_experts, places)
    weights = jnp.where(kept, probabilities, 0)
    if not config.norm_topk_prob:
        return choices, weights, kept
    total = weights.sum(-1, keepdims=True)
    return choices, weights / jnp.where(total > 0, total, 1), kept


def within_capacity(
    choices: jax.Array, valid: jax.Array, num_experts: int, places: int
) -> jax.Array:
    """Tells which choices fit into an expert's capacity.

    Places are given to all first choices before all second ones, in token order.

    Args:
      choices: i32[B,S,K], experts of each token.
      valid: bool[B,S]; padding takes no places.
      num_experts: E.
      places: Tokens that an expert can take.

    Returns:
      bool[B,S,K], True where the choice finds a place.
    """
    experts_per_token = choices.shape[-1]
    in_order = choices.reshape(-1, experts_per_token).T.reshape(-1)
    is_expert = jax.nn.one_hot(in_order, num_experts, dtype=jnp.int32)
    requests = is_expert * jnp.tile(valid.reshape(-1), experts_per_token)[:, None]
    place = jnp.take_along_axis(jnp.cumsum(requests, axis=0), in_order[:, None], axis=1)
    return (place <= places).reshape(experts_per_token, -1).T.reshape(choices.shape)


@jax.named_scope("balance")
def report(logits: jax.Array, choices: jax.Array, kept: jax.Array, valid: jax.Array) -> MoEAux:
    """Router losses and expert load of one layer.

    Example for the balance loss: two experts, two tokens with the probabilities (0.8, 0.2) and
    (0.6, 0.4). Both choose expert 0 first, so the mean probabilities are (0.7, 0.3), the shares of
    first choices are (1, 0), and the loss is 2 * (0.7 * 1 + 0.3 * 0) = 1.4. Had the tokens
    (0.8, 0.2) and (0.2, 0.8), all four means would be 0.5 and the loss 2 * (0.25 + 0.25) = 1.

    Example for the z-loss: a token with the logits (0, 0) has logsumexp ln 2 = 0.6931, one with
    (0, ln 2) has ln 3 = 1.0986. The loss is (0.4805 + 1.2069) / 2 = 0.8437.

    Args:
      logits: f32[B,S,E], of the router.
      choices, kept: i32 and bool[B,S,K], as returned by `route`.
      valid: bool[B,S], False for padding.
    """
    E = logits.shape[-1]
    count = jnp.maximum(valid.sum(), 1)

    def mean(values: jax.Array) -> jax.Array:
        weights = valid.astype(jnp.float32)
        return jnp.einsum("bs...,bs->...", values, weights, precision="highest") / count

    balance = E * jnp.sum(mean(jax.nn.softmax(logits)) * mean(jax.nn.one_hot(choices[..., 0], E)))
    z = mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
    load = jnp.sum(jax.nn.one_hot(choices, E) * kept[..., None], axis=(0, 1, 2))
    return MoEAux(balance, z, load)


def _float32_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """f[B,S,D] times f32[D,n] -> f32[B,S,n].

    Routing and mixing need float32 products; the TPU default rounds the inputs to bfloat16.
    """
    return jnp.einsum("bsd,dn->bsn", x.astype(jnp.float32), w, precision="highest")
