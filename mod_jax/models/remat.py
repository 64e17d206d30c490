"""What the backward pass of a layer recomputes, by the name in `ModelConfig.remat`."""

import functools
from collections.abc import Callable

import jax

from mod_jax.ops.blocked_attention import SAVED
from mod_jax.ops.weights import keeps_no_weight
from mod_jax.sharding import platform

policies = jax.checkpoint_policies

# `prevent_cse` keeps XLA from merging the recomputation with the forward pass. Layers run inside a
# scan, whose loop already keeps the two apart, so this would only hinder optimizations.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    # But for weights that were gathered from other devices: all of them would be the whole model.
    "none": functools.partial(jax.checkpoint, policy=keeps_no_weight, prevent_cse=False),
    "dots": functools.partial(
        jax.checkpoint,
        policy=policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED)
        ),
        prevent_cse=False,
    ),
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
}
# What "auto" is, as measured (benchmarks/LOG.md). A CPU computes what is not a product at little
# cost, and memory that is not touched is time saved there. On accelerators the memory of long rows
# decides.
ON_CPU, ELSEWHERE = "dots", "full"


def rematerialised(name: str, layer: Callable) -> Callable:
    """The layer with a backward pass that recomputes what `ModelConfig.remat` says.

    Args:
      name: A key of `REMAT`, or "auto", which goes by the platform of the ambient mesh.
      layer: A function of arrays.
    """
    if name == "auto":
        name = ON_CPU if platform() == "cpu" else ELSEWHERE
    return REMAT[name](layer)
