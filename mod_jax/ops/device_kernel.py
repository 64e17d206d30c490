"""Calls a kernel that knows nothing of meshes on the arrays of each device."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec


def on_device(kernel: Callable, *arrays: jax.Array) -> jax.Array:
    """Calls a kernel, also within `jax.shard_map`.

    There JAX types arrays by the mesh axes over which they vary, and refuses kernels that do not
    say so of their results.

    Args:
      kernel: (*arrays) -> array.
      *arrays: Arrays of this device.

    Returns:
      What the kernel returns; it varies over the axes over which any of the arrays does.
    """
    # equivalent to: kernel(*arrays)
    varying = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    if not varying:
        return kernel(*arrays)
    here = PartitionSpec()
    out = jax.shard_map(kernel, in_specs=here, out_specs=here, axis_names=set(), check_vma=False)(
        *arrays
    )
    return jax.lax.pcast(out, tuple(varying), to="varying")
