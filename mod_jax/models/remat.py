"""What the backward pass of a layer recomputes, by the name in `ModelConfig.remat`."""

import functools
from collections.abc import Callable

import jax

# `prevent_cse` keeps XLA from merging the recomputation with the forward pass. Layers run inside a
# scan, whose loop already keeps the two apart, so this would only hinder optimizations.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,
    "dots": functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        prevent_cse=False,
    ),
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
}
