"""Sparse upcycling: a dense model becomes a mixture of experts that computes what it did (arXiv 2212.05055; method: MoE).

Axes: L layers (Ld dense, Lm sparse), E experts, D width, F feed-forward.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mod_jax.config import ModelConfig, MoEConfig, require

LAYERS = "language_model.layers."
EXPERTS = {"gate.w_df": "gate.w_edf", "up.w_df": "up.w_edf", "down.w_fd": "down.w_efd"}


def upcycle(
    params: dict, config: ModelConfig, moe: MoEConfig, key: jax.Array
) -> tuple[dict, ModelConfig]:
    """Replaces the feed-forward layers that `moe` names by mixtures of experts.

    Each expert (and the residual one) is a copy of the layer it replaces. The weights of a token's experts sum to 1, so the output stays.

    Args:
      params: name -> array, of a dense model; left as they are.
      config: of that model.
      moe: which layers, and how they route.
      key: of the routers, U(-1/sqrt(D), 1/sqrt(D)).
    Returns:
      The sparse model's parameters and config.
    Raises:
      ConfigError: if the model is sparse already, or `moe` names layers that it lacks.
    """
    require(
        config.decoder.moe is None,
        "decoder.moe",
        config.decoder.moe,
        "None, a dense decoder to upcycle",
        "Remove `upcycle` from this stage.",
    )
    decoder = dataclasses.replace(config.decoder, moe=moe)
    sparse = jnp.array(decoder.sparse_layers)
    dense = jnp.array(
        [n for n in range(decoder.num_layers) if n not in decoder.sparse_layers], jnp.int32
    )
    Lm, D, E = len(sparse), decoder.hidden_size, moe.num_experts

    made = {name: array for name, array in params.items() if not name.startswith(LAYERS + "mlp.")}
    made[LAYERS + "moe.router.w_de"] = jax.random.uniform(
        key, (Lm, D, E), jnp.float32, -(D**-0.5), D**-0.5
    )
    for name, expert_name in EXPERTS.items():
        stack = params[f"{LAYERS}mlp.{name}"]
        copied = stack[sparse]
        made[f"{LAYERS}moe.experts.{expert_name}"] = jnp.repeat(copied[:, None], E, axis=1)
        if moe.residual:
            made[f"{LAYERS}moe.residual.{name}"] = copied
        if len(dense):
            made[f"{LAYERS}mlp.{name}"] = stack[dense]
    if moe.residual:
        made |= {
            LAYERS + "moe.residual.mix.w_d2": jnp.zeros((Lm, D, 2)),
            LAYERS + "moe.residual.mix.b_2": jnp.zeros((Lm, 2)),
        }
    return made, dataclasses.replace(config, decoder=decoder)
