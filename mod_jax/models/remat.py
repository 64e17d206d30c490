"""What the backward pass of a layer recomputes, by the name in `ModelConfig.remat`."""

import functools

import jax

# prevent_cse: inside a scan the loop itself keeps the recomputation apart from the forward pass.
REMAT = {
    "none": lambda layer: layer,
    "dots": functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        prevent_cse=False,
    ),
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
}
