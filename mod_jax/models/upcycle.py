"""Sparse upcycling: turns a dense model into a mixture of experts with the same outputs.

Sources: arXiv 2212.05055 (upcycling); arXiv 2408.15881 (LLaVA-MoD, which starts its student so).

Axes: L layers (Ld dense, Lm sparse), E experts, D width, F width of the feed-forward layer.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mod_jax.config import ModelConfig, MoEConfig, require

LAYERS = "language_model.layers."
EXPERTS = {"gate.w_df": "gate.w_edf", "up.w_df": "up.w_edf", "down.w_fd": "down.w_efd"}


def sparse_config(config: ModelConfig, moe: MoEConfig) -> ModelConfig:
    """Returns the configuration that a dense model has after upcycling.

    Args:
      config: Configuration of the dense model.
      moe: Which layers become sparse, and how they route.

    Raises:
      ConfigError: If the model is sparse already, or if `moe` names layers that it does not have.
    """
    require(
        config.decoder.moe is None,
        "decoder.moe",
        config.decoder.moe,
        "None, a dense decoder to upcycle",
        "Remove `upcycle` from this stage.",
    )
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, moe=moe))


def upcycle(
    params: dict, config: ModelConfig, moe: MoEConfig, key: jax.Array
) -> tuple[dict, ModelConfig]:
    """Replaces the feed-forward layers that `moe` names by mixtures of experts.

    Each expert, the shared one of a residual layer included, is a copy of the dense layer. The
    weights of a token's experts sum to 1, so the outputs do not change, except for tokens that a
    capacity limit leaves without any expert. Without `norm_topk_prob` the weights sum to less: the
    output of a sparse layer is scaled by that sum, about K / E at first.

    Args:
      params: Name -> array, the parameters of a dense model; not modified.
      config: Configuration of that model.
      moe: Which layers become sparse, and how they route.
      key: Random key for the routers, drawn from U(-1/sqrt(D), 1/sqrt(D)).

    Returns:
      The parameters and the configuration of the sparse model.

    Raises:
      ConfigError: As `sparse_config`.
    """
    sparse_model = sparse_config(config, moe)
    decoder = sparse_model.decoder
    sparse = jnp.array(decoder.sparse_layers)
    dense = jnp.array(
        [n for n in range(decoder.num_layers) if n not in decoder.sparse_layers], jnp.int32
    )
    Lm, D, E = len(sparse), decoder.hidden_size, moe.num_experts

    upcycled = {
        name: array for name, array in params.items() if not name.startswith(LAYERS + "mlp.")
    }
    upcycled[LAYERS + "moe.router.w_de"] = jax.random.uniform(
        key, (Lm, D, E), jnp.float32, -(D**-0.5), D**-0.5
    )
    for name, expert_name in EXPERTS.items():
        stack = params[f"{LAYERS}mlp.{name}"]
        copied = stack[sparse]
        upcycled[f"{LAYERS}moe.experts.{expert_name}"] = jnp.repeat(copied[:, None], E, axis=1)
        if moe.residual:
            upcycled[f"{LAYERS}moe.residual.{name}"] = copied
        if len(dense):
            upcycled[f"{LAYERS}mlp.{name}"] = stack[dense]
    if moe.residual:
        upcycled[LAYERS + "moe.residual.mix.w_d2"] = jnp.zeros((Lm, D, 2))
        upcycled[LAYERS + "moe.residual.mix.b_2"] = jnp.zeros((Lm, 2))
    return upcycled, sparse_model
