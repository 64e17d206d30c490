"""Meshes of real slices, which only the TPU compiler knows."""

import pytest

from mod_jax.config import ConfigError, MeshConfig
from mod_jax.rehearsal import topology
from mod_jax.rehearsal.hardware import hardware
from mod_jax.sharding import make_mesh

# Shapes for which two axes share one of the slice, which `jax.make_mesh` refuses.
SHARED = [
    ("v5p-128", (1, 32, 2, 1)),
    ("v5p-128", (1, 8, 4, 2)),
    ("v5p-128", (2, 8, 4, 1)),
    ("v6e-256", (1, 64, 4, 1)),
]


def devices(name, slices=1):
    topology.prepare()
    try:
        return topology.devices(name, slices)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("name", "shape"), SHARED)
def test_axes_may_share_an_axis_of_a_slice(name, shape):
    mesh = make_mesh(MeshConfig(*shape), devices(name))
    assert mesh.devices.shape == shape
    assert len(set(mesh.devices.flat)) == mesh.size


@pytest.mark.parametrize("name", topology.SLICES)
def test_every_slice_has_as_many_devices_as_its_name_says(name):
    cores_a_device = 2 if name.startswith("v5p") else 1
    assert len(devices(name)) == int(name.partition("-")[2]) // cores_a_device
    assert len(devices(name)) % hardware(name).devices_a_host == 0


def test_the_data_axis_goes_over_slices():
    both = devices("v5e-16", 2)
    mesh = make_mesh(MeshConfig(4, 4, 2, 1), both)
    slices = [{device.slice_index for device in part.flat} for part in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(ConfigError, match=r"mesh.data = 1: expected a multiple of 2, the n"):
        make_mesh(MeshConfig(1, 32, 1, 1), both)
