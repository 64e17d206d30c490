"""Constructors of parameters, each with the logical axes of its dimensions, and their product.

Every parameter of every module is made here: float32, of shape `stack + shape`, for one layer or
for a stack of layers. `sharding.parameter_shardings` reads its metadata `axes`, which has a name of
its own so that flax does not take it for a sharding annotation and place the array itself.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mod_jax.ops.linear import linear

Axes = tuple[str | None, ...]


def weight(
    rngs: nnx.Rngs, stack: tuple[int, ...], shape: tuple[int, ...], axes: Axes, stddev: float
) -> nnx.Param:
    """A weight drawn from a normal distribution with mean 0.

    Args:
      rngs: Its stream `params` gives the key.
      stack: Leading dimensions: `()` for one layer, `(layers,)` for a stack.
      shape: Dimensions of one layer's weight.
      axes: Logical axis (a key of `sharding.RULES`) of each dimension of `shape`.
      stddev: Standard deviation.

    Returns:
      f32[*stack, *shape] with the axes `("layers",) * len(stack) + axes`.

    Raises:
      ValueError: If `axes` and `shape` differ in length.
    """
    value = jax.random.normal(rngs.params(), stack + shape, jnp.float32) * stddev
    return _parameter(value, stack, axes)


def uniform(
    rngs: nnx.Rngs, stack: tuple[int, ...], shape: tuple[int, ...], axes: Axes, bound: float
) -> nnx.Param:
    """A weight drawn uniformly from [-bound, bound); otherwise as `weight`."""
    value = jax.random.uniform(rngs.params(), stack + shape, jnp.float32, -bound, bound)
    return _parameter(value, stack, axes)


def constant(stack: tuple[int, ...], shape: tuple[int, ...], axes: Axes, value: float) -> nnx.Param:
    """The scale of a norm, or a bias, filled with `value`; otherwise as `weight`."""
    return _parameter(jnp.full(stack + shape, value, jnp.float32), stack, axes)


def _parameter(value: jax.Array, stack: tuple[int, ...], axes: Axes) -> nnx.Param:
    axes = ("layers",) * len(stack) + axes
    if len(axes) != value.ndim:
        raise ValueError(
            f"axes = {axes}: expected one logical axis for each dimension of {value.shape}."
        )
    return nnx.Param(value, axes=axes)


def multiplied(x: jax.Array, parameter: nnx.Param, inputs: int = 1) -> jax.Array:
    """`ops.linear.linear` with the weight of one layer (a stack is sliced first)."""
    w = parameter[...]
    return linear(x, w, inputs, parameter.axes[-w.ndim :])
