"""The mesh of a topology, for tests that need its compiler, and how they compile for it."""

import pytest

from mod_jax.config import ConfigError, MeshConfig
from mod_jax.rehearsal import topology
from mod_jax.rehearsal.stage import QUICK
from mod_jax.sharding import make_mesh


def mesh_of(name: str, config: MeshConfig):
    """The mesh; the test is skipped if the compiler is not installed."""
    topology.prepare()
    try:
        devices = topology.devices(name)
    except ConfigError as error:
        pytest.skip(str(error))
    return make_mesh(config, devices)


def options_of(mesh) -> dict | None:
    """Options of a quick compilation."""
    return QUICK if mesh.devices.flat[0].platform == "tpu" else None
