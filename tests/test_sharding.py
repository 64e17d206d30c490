"""The mesh and the table from logical axes to it.

Rows that do not divide over the mesh are named before anything runs.
"""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mod_jax.config import ConfigError, MeshConfig
from mod_jax.sharding import (
    AXES,
    RULES,
    check_platform,
    check_rows,
    constrain_rows,
    make_mesh,
    parameter_shardings,
    partition,
    replicated,
    row_sharding,
)

ROOT = pathlib.Path(__file__).parents[1]
MESH = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)


def shape(*sizes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, np.float32)


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1, 1)),
        (MeshConfig(2, -1, 2, 1), (2, 2, 2, 1)),
        (MESH, (1, 2, 2, 2)),
    ],
)
def test_one_axis_takes_what_is_left(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES and tuple(mesh.shape.values()) == sizes
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


def test_a_mesh_of_some_devices():
    assert set(make_mesh(MeshConfig(), jax.devices()[:3]).devices.flat) == set(jax.devices()[:3])


@pytest.mark.parametrize(
    "config, message",
    [
        (
            MeshConfig(data=1, fsdp=3),
            (
                r"mesh = \{'data': 1, 'fsdp': 3, .*expected sizes with the product 8, "
                r".*Set one axis to -1"
            ),
        ),
        (MeshConfig(data=-1, fsdp=3), "expected sizes whose product divides the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(config)


def test_parameters_lie_where_their_logical_axes_say():
    """A dense weight over (fsdp, expert) and tensor, an expert's over expert, fsdp and tensor.

    Axes of layers and of a head's elements are not split.
    """
    axes = {
        "dense": ("layers", "embed", "heads", None),
        "expert": ("layers", "expert", "expert_embed", "mlp"),
        "head": ("vocab", "embed"),
        "scalar": (),
    }
    shapes = {
        "dense": shape(3, 8, 4, 5),
        "expert": shape(3, 4, 6, 10),
        "head": shape(6, 4),
        "scalar": shape(),
    }
    mesh = make_mesh(MESH)
    found = parameter_shardings(mesh, shapes, axes)
    assert {name: s.spec for name, s in found.items()} == {
        "dense": PartitionSpec(None, ("fsdp", "expert"), "tensor", None),
        "expert": PartitionSpec(None, "expert", "fsdp", "tensor"),
        "head": PartitionSpec("tensor", ("fsdp", "expert")),
        "scalar": PartitionSpec(),
    }
    assert found["dense"].shard_shape(shapes["dense"].shape) == (3, 2, 2, 5)
    assert found["expert"].shard_shape(shapes["expert"].shape) == (3, 2, 3, 5)


@pytest.mark.parametrize(
    ("size", "axis", "split"),
    [
        (12, "embed", ("fsdp", "expert")),
        (4, "embed", "fsdp"),  # over as many devices as it can be
        (9, "embed", "expert"),
        (5, "embed", None),
        (14, "mlp", "tensor"),
        (6, "mlp", None),
        (3, "expert_embed", None),
    ],
)
def test_a_dimension_that_does_not_divide_lies_on_fewer_devices(size, axis, split):
    mesh = jax.sharding.AbstractMesh((1, 2, 3, 7), AXES)
    assert partition(mesh, (size, 1), (axis, None)) == PartitionSpec(split, None)


def test_no_two_dimensions_of_a_weight_share_a_mesh_axis():
    """For all combinations of axes that the weights of the models have."""
    for axes in [
        ("vocab", "embed"),
        ("embed", "heads"),
        ("embed", "kv_heads"),
        ("embed", "mlp"),
        ("expert", "expert_embed", "mlp"),
    ]:
        used = []
        for axis in axes:
            used += [RULES[axis]] if isinstance(RULES[axis], str) else RULES[axis]
        assert len(used) == len(set(used)), axes


def test_rows_are_split_over_all_axes_but_tensor():
    mesh = make_mesh(MESH)
    assert row_sharding(mesh).shard_shape((8, 3)) == (2, 3)
    assert replicated(mesh).shard_shape((8, 3)) == (8, 3)
    check_rows(mesh, 8, 2)
    with pytest.raises(
        ConfigError,
        match=r"rows / accumulation = 2: expected a multiple of data x fsdp x expert = 4",
    ):
        check_rows(mesh, 8, 4)


def test_activations_stay_split_by_rows_under_a_mesh_and_as_they_are_without():
    x, mesh = np.arange(16.0).reshape(8, 2), make_mesh(MESH)
    assert constrain_rows(x) is x
    with jax.set_mesh(mesh):
        y = jax.jit(constrain_rows)(x)
    np.testing.assert_array_equal(y, x)
    assert y.sharding.is_equivalent_to(row_sharding(mesh), 2)


@pytest.mark.parametrize(
    "error, said",
    [
        # what jax raises for tpu and for cuda, without the device or the plugin
        (RuntimeError("Unable to initialize backend 'tpu':\nno libtpu"), "'tpu': no libtpu"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_platform_without_a_device_is_one_line(error, said, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ConfigError) as caught:
        make_mesh(MeshConfig())
    assert str(caught.value).startswith("JAX_PLATFORMS = 'cuda': expected ")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_devices_that_fail_though_no_platform_was_asked_for_are_no_fault_of_the_variable(
    monkeypatch,
):
    def devices():
        raise RuntimeError("no answer from the coordinator")

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(RuntimeError, match="no answer from the coordinator"):
        check_platform()


def test_each_command_says_in_one_line_that_a_platform_is_not_there(tmp_path):
    commands = [
        ["train", "--config=configs/quickstart.py", f"--workdir={tmp_path}/run"],
        ["generate", "--model=assets/scenes/teacher"],
        ["convert", "export", "assets/scenes/teacher", f"{tmp_path}/exported"],
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"mod_jax.{command}", *options],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "abacus"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, *options in commands
    ]  # at the same time, as importing takes most of theirs
    for process in processes:
        _, stderr = process.communicate()
        assert process.returncode == 1
        (line,) = stderr.splitlines()
        assert line.startswith("error: JAX_PLATFORMS = 'abacus': expected ")
        assert "Unset it" in line
    assert not list(tmp_path.iterdir())
