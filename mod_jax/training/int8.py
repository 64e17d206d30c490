"""Weights held as int8, which take half of the memory of bfloat16.

Only storage is int8: a product computes in the dtype of its activations, with the weight made again
where it is used (`Int8.astype`). So nothing but the rounding of the weights changes. A library that
quantises whole models (qwix) replaces their operations as well, and would have to know stacked
layers and flat parameter names; what is needed here is one rounding and one product.

The effect, on the teacher in assets and 3,220 answer positions of the quickstart: the KL of its
words in int8 to those in float32 is 2.4e-6 nats a position, that of its words in bfloat16 4.0e-6;
its next-token loss is 0.8439 instead of 0.8442.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mod_jax.batch import Array

LARGEST = 127  # values are in [-127, 127], so that a scale serves both signs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A weight in int8; to models it is an array, which they cast to the dtype of a product.

    Attributes:
      values: i8[...]. As the other field, an array, its shape, or its sharding.
      scales: f32[...], of size 1 along the axis whose numbers share a scale. A number of the weight
        is its value times its scale.
    """

    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """int8."""
        return self.values.dtype

    def __getitem__(self, index: object) -> "Int8":
        """The whole weight, as flax asks its variables for it: `variable[...]`."""
        if index is not Ellipsis:
            raise IndexError(f"index {index!r} of an int8 weight: expected `...`.")
        return self

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """The weight as an array, multiplied in float32."""
        return (self.values * self.scales).astype(dtype)


def quantised(name: str, x: Array) -> Int8:
    """Rounds a weight to int8, a scale for all numbers along its first dimension in a product.

    The error of a number is at most half of its scale: 1/254 of the largest number with which it
    shares it.

    Args:
      name: Name of the parameter, whose suffix names the dimensions of one layer.
      x: f[...], a numpy array or one on devices.
    """
    xp = x.__array_namespace__()
    x = x.astype(jnp.float32)
    highest = xp.max(xp.abs(x), axis=_shared_axis(name, x.ndim), keepdims=True)
    scales = xp.where(highest > 0, highest, 1) / LARGEST
    return Int8(xp.round(x / scales).astype(jnp.int8), scales)


def scales_sharding(name: str, sharding: NamedSharding) -> NamedSharding:
    """The sharding of the scales of a weight with this sharding, one axis for each dimension."""
    axes = list(sharding.spec)
    axes[_shared_axis(name, len(axes))] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def _shared_axis(name: str, ndim: int) -> int:
    """The first dimension of the weight of one layer, or of one expert ("e")."""
    of_a_layer = name.rpartition("_")[2]
    return ndim - len(of_a_layer.removeprefix("e"))
