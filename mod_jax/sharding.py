"""Mesh axes, and the one table from the logical axes of parameters and activations to them.

Mesh axes: data (replicas, across slices), fsdp, expert, tensor. Rows are split over data x fsdp x expert.
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mod_jax.config import ConfigError, MeshConfig, require

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")

# Logical axis of a parameter -> mesh axes. None: replicated.
RULES = {
    "layers": None,
    "vocab": "tensor",
    "embed": (
        "fsdp",
        "expert",
    ),  # dense weights: no expert axis of their own, so it serves as a second fsdp
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "expert_embed": "fsdp",
    None: None,
}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The mesh of a run.

    Raises:
      ConfigError: if the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config, axis) for axis in AXES]
    free = [axis for axis, n in zip(AXES, shape) if n == -1]
    known = math.prod(n for n in shape if n != -1)
    asked = dict(zip(AXES, shape))
    require(
        len(free) <= 1 and all(n > 0 or n == -1 for n in shape),
        "mesh",
        asked,
        "positive sizes, at most one of them -1 (the rest)",
    )
    if free:
        require(
            len(devices) % known == 0,
            "mesh",
            asked,
            f"sizes whose product divides the {len(devices)} devices",
        )
        shape[AXES.index(free[0])] = len(devices) // known
    require(
        math.prod(shape) == len(devices),
        "mesh",
        asked,
        f"sizes with the product {len(devices)}, the number of devices",
        "Set one axis to -1 to take what is left.",
    )
    return jax.make_mesh(
        tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def parameter_shardings(mesh: Mesh, shapes: dict, axes: dict) -> dict:
    """Sharding of every parameter.

    Args:
      mesh: from make_mesh.
      shapes: name -> anything with .shape.
      axes: name -> logical axis of each dimension.
    Raises:
      ConfigError: naming every parameter dimension that does not divide.
    """
    wrong, shardings = [], {}
    for name, array in shapes.items():
        spec = [RULES[axis] for axis in axes[name]]
        for size, axis, mesh_axes in zip(array.shape, axes[name], spec, strict=True):
            ways = math.prod(
                mesh.shape[a]
                for a in ((mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ())
            )
            if size % ways:
                wrong.append(f"{name}: {axis} of size {size} over {mesh_axes} = {ways} devices")
        shardings[name] = NamedSharding(mesh, PartitionSpec(*spec))
    if wrong:
        raise ConfigError(
            "these sizes do not divide over the mesh; choose other mesh sizes: " + "; ".join(wrong)
        )
    return shardings


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of scalars and counters."""
    return NamedSharding(mesh, PartitionSpec())


def check_rows(mesh: Mesh, rows: int, accumulation: int) -> None:
    """Raises ConfigError unless every micro-batch splits evenly over the row axes of the mesh."""
    ways = math.prod(mesh.shape[a] for a in ROWS)
    require(
        (rows // accumulation) % ways == 0,
        "rows / accumulation",
        rows // accumulation,
        f"a multiple of data x fsdp x expert = {ways}",
    )


def constrain_rows(x: jax.Array) -> jax.Array:
    """Keeps activations split by rows under the ambient mesh (`jax.set_mesh`); the identity without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))
