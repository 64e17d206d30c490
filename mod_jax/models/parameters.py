"""Parameters that carry the logical axes of their dimensions, for one layer or a stack of layers.

Every leaf of a module is made here: float32, `stack + shape`, with the metadata `axes` that `sharding.parameter_shardings` reads.
The metadata has a name of its own, so that flax leaves the placement to us.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def weight(
    rngs: nnx.Rngs, stack: tuple[int, ...], shape: tuple[int, ...], axes: tuple, stddev: float
) -> nnx.Param:
    """A normally distributed weight.

    Args:
      rngs: its stream `params` gives the key.
      stack: leading dimensions, `()` for one layer or `(layers,)`.
      shape: dimensions of one layer's weight.
      axes: logical axis (a key of `sharding.RULES`) of each dimension of `shape`.
      stddev: standard deviation.
    Returns:
      f32[*stack, *shape], its axes `("layers",) * len(stack) + axes`.
    """
    return _parameter(
        jax.random.normal(rngs.params(), stack + shape, jnp.float32) * stddev, stack, axes
    )


def uniform(
    rngs: nnx.Rngs, stack: tuple[int, ...], shape: tuple[int, ...], axes: tuple, bound: float
) -> nnx.Param:
    """A weight uniform in [-bound, bound); otherwise as `weight`."""
    return _parameter(
        jax.random.uniform(rngs.params(), stack + shape, jnp.float32, -bound, bound), stack, axes
    )


def constant(
    stack: tuple[int, ...], shape: tuple[int, ...], axes: tuple, value: float
) -> nnx.Param:
    """A norm's scale or a bias that starts at `value`; otherwise as `weight`."""
    return _parameter(jnp.full(stack + shape, value, jnp.float32), stack, axes)


def _parameter(value: jax.Array, stack: tuple[int, ...], axes: tuple) -> nnx.Param:
    axes = ("layers",) * len(stack) + tuple(axes)
    if len(axes) != value.ndim:
        raise ValueError(
            f"axes = {axes}: expected one logical axis for each dimension of {value.shape}."
        )
    return nnx.Param(value, axes=axes)
