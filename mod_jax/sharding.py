"""The mesh, and the table that maps logical axes of parameters and activations to mesh axes.

Mesh axes: data (replicas, across slices), fsdp, expert, tensor. Rows of a batch are split over
data x fsdp x expert.
"""

import functools
import math
import os
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from mod_jax.config import ConfigError, MeshConfig, require

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")

Split = str | tuple[str, ...] | None  # the mesh axes of a dimension, as in a PartitionSpec

# Logical axis of a parameter -> mesh axes; None is replicated.
RULES: dict[str | None, Split] = {
    "layers": None,
    # Words of an embedding table or a head. What devices along `expert` exchange for it is little,
    # as they are few, and no device needs a whole table.
    "vocab": ("tensor", "expert"),
    "word_embed": "fsdp",
    # Dense weights have no expert axis of their own, so `expert` serves as a second fsdp for them.
    "embed": ("fsdp", "expert"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "expert_embed": "fsdp",
    None: None,
}


def check_platform() -> None:
    """Checks that JAX finds devices: the first thing that a command asks of it.

    Raises:
      ConfigError: If JAX_PLATFORMS names a platform that has no device here.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for cuda without its plugin
        platforms = os.environ.get("JAX_PLATFORMS")
        if not platforms:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"JAX_PLATFORMS = {platforms!r}: expected platforms that have a device here. Unset it "
            f"to let JAX choose, or set it to cpu. JAX says: {reason}"
        ) from error


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run.

    Axes follow the links of a TPU slice, and two of them may share an axis of the slice. Of several
    slices the data axis comes first: it alone crosses the network between them.

    Args:
      config: Devices along each axis.
      devices: Devices of the mesh; all devices by default.

    Raises:
      ConfigError: If the product of the axes is not the number of devices, if slices do not divide
        the data axis, or as `check_platform`.
    """
    check_platform()
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config, axis) for axis in AXES]
    sizes = dict(zip(AXES, shape))
    free = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in shape if size != -1)
    if free:
        require(
            len(devices) % known == 0,
            "mesh",
            sizes,
            f"sizes whose product divides the {len(devices)} devices",
        )
        shape[AXES.index(free[0])] = len(devices) // known
    require(
        math.prod(shape) == len(devices),
        "mesh",
        sizes,
        f"sizes with the product {len(devices)}, the number of devices",
        "Set one axis to -1 to give it the devices that are left.",
    )
    # GPUs have the number of a slice too: that of a host, over which any axis may go.
    is_tpu = devices[0].platform == "tpu"
    # those of a single slice that is not here have none
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
    data, *others = shape
    require(
        data % slices == 0,
        "mesh.data",
        data,
        f"a multiple of {slices}, the number of TPU slices, as this axis alone spans them",
    )
    # `jax.make_mesh` refuses several slices, and shapes of one for which two axes have to share an
    # axis of the slice.
    if slices > 1:
        of_slice, of_slices = (data // slices, *others), (slices, *(1 for _ in others))
        array = mesh_utils.create_hybrid_device_mesh(
            of_slice, of_slices, devices, allow_split_physical_axes=True
        )
    else:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition(
    mesh: Mesh | AbstractMesh, shape: Sequence[int], axes: Sequence[str | None]
) -> PartitionSpec:
    """How a parameter is split.

    A dimension that does not divide over all mesh axes of its rule is split over as many of them as
    it can be, and is whole on every device if it divides over none.

    Args:
      mesh: From `make_mesh`.
      shape: Of the parameter.
      axes: Logical axis (a key of `RULES`) of each dimension.

    Returns:
      Mesh axes of each dimension.
    """
    return PartitionSpec(
        *(_split(mesh, size, axis) for size, axis in zip(shape, axes, strict=True))
    )


def _split(mesh: Mesh | AbstractMesh, size: int, axis: str | None) -> Split:
    """The mesh axes of a dimension, without those that have one device."""
    rule = tuple(a for a in mesh_axes(RULES[axis]) if mesh.shape[a] > 1)
    choices: list[Split] = [*rule, rule]
    fitting = [choice for choice in choices if size % ways(mesh, choice) == 0]
    return max(fitting, key=functools.partial(ways, mesh), default=None) or None


def mesh_axes(split: Split) -> tuple[str, ...]:
    """The mesh axes of a dimension, from its entry in a PartitionSpec."""
    return (split,) if isinstance(split, str) else split or ()


def ways(mesh: Mesh | AbstractMesh, split: Split) -> int:
    """Number of parts of a dimension, from its entry in a PartitionSpec."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(split))


def parameter_shardings(
    mesh: Mesh, shapes: Mapping, axes: Mapping[str, tuple]
) -> dict[str, Sharding]:
    """The sharding of each parameter: name -> sharding, for the names in `shapes`.

    Args:
      mesh: From `make_mesh`.
      shapes: Name -> anything with a shape.
      axes: Name -> logical axis of each dimension, for at least the names in `shapes`.
    """
    return {
        name: NamedSharding(mesh, partition(mesh, array.shape, axes[name]))
        for name, array in shapes.items()
    }


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of scalars and counters."""
    return NamedSharding(mesh, PartitionSpec())


def row_ways(mesh: Mesh | AbstractMesh) -> int:
    """Number of devices, or of groups of them, that the rows of a batch are split over."""
    return ways(mesh, ROWS)


def check_rows(mesh: Mesh, rows: int, accumulation: int) -> None:
    """Checks that micro-batches split evenly over the devices.

    Args:
      mesh: From `make_mesh`.
      rows: Rows of the global batch.
      accumulation: Micro-batches per step.

    Raises:
      ConfigError: If the rows of a micro-batch do not divide over the row axes of the mesh.
    """
    ways = row_ways(mesh)
    require(
        (rows // accumulation) % ways == 0,
        "rows / accumulation",
        rows // accumulation,
        f"a multiple of data x fsdp x expert = {ways}",
    )


def platform() -> str:
    """Name of the platform that a program is traced for: "cpu", "tpu" or "gpu".

    It is that of the ambient mesh (`jax.set_mesh`), whose devices need not be here, or else that of
    the default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def ambient_mesh() -> AbstractMesh | None:
    """The ambient mesh (`jax.set_mesh`) if it has several devices, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Casts an array to vary along axes of a `jax.shard_map`: its gradient is summed over them."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def constrain_rows(x: jax.Array) -> jax.Array:
    """Keeps activations split by rows under the ambient mesh (`jax.set_mesh`).

    Without an ambient mesh it returns `x` unchanged.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))
