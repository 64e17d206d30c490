"""Devices of accelerators that are not here, for which programs can be compiled all the same.

A TPU slice needs `jax[tpu]`, a host of GPUs the CUDA plugins of jax and NVIDIA's compilers
(requirements-tpu.txt, requirements-gpu.txt). Neither needs the hardware.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.experimental import topologies

from mod_jax.config import ConfigError, require

CARDS = pathlib.Path(__file__).with_name("cards")


class Slice(NamedTuple):
    """How libtpu calls a TPU slice.

    Attributes:
      topology: Generation and chips along each axis.
      chip: Name of the chip's configuration; a "megacore" is one device of two cores.
      rings: Whether the links along every axis of more than two chips close to a ring, as they do
        in a whole pod of v5e and v6e, and in cubes of v5p.
    """

    topology: str
    chip: str = "default"
    rings: bool = False


# Names as in Google Cloud: v5e, v6e and tpu7x by chips, of which the last has two devices; v5p by
# cores, of which two are one device.
SLICES = {
    "v5e-4": Slice("v5e:2x2"),
    "v5e-16": Slice("v5e:4x4"),
    "v5e-64": Slice("v5e:8x8"),
    "v5e-256": Slice("v5e:16x16", rings=True),
    "v6e-16": Slice("v6e:4x4"),
    "v6e-256": Slice("v6e:16x16", rings=True),
    "v5p-32": Slice("v5:2x2x4", "megacore"),
    "v5p-128": Slice("v5:4x4x4", "megacore", rings=True),
    "tpu7x-16": Slice("tpu7x:2x2x2"),
}
# Name -> (file in cards/, GPUs of the host). Descriptions of cards are those of the XLA project
# (xla/backends/gpu/target_config/specs), with the CUDA version that compiles here.
HOSTS = {
    "h100-1": ("h100", 1),
    "h100-8": ("h100", 8),
    "h200-1": ("h200", 1),
    "h200-8": ("h200", 8),
    "a100-8": ("a100", 8),
    "b200-8": ("b200", 8),
}
NAMES = (*SLICES, *HOSTS)


def prepare() -> None:
    """Lets jax use the compilers alone, in this process; call it before anything runs in jax."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read such programs back
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "-1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-32",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Devices of a slice or a host, which exist for the compiler alone.

    Args:
      name: One of `NAMES`.
      slices: Number of such slices.

    Raises:
      ConfigError: If the name is unknown, its compiler is not installed, or there are several hosts
        of GPUs.
    """
    require(name in NAMES, "topology", name, "one of " + ", ".join(NAMES))
    on_tpu = name in SLICES
    require(on_tpu or slices == 1, "slices", slices, f"1, as {name} is one host of GPUs")
    try:
        return list((_slice(name, slices) if on_tpu else _host(name)).devices)
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        remedy = "pip install jax[tpu]" if on_tpu else "pip install -r requirements-gpu.txt"
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"topology = {name!r}: expected an installed compiler for it. Try {remedy}. "
            f"JAX says: {reason}"
        ) from error


def _slice(name: str, slices: int) -> topologies.TopologyDescription:
    topology, chip, rings = SLICES[name]
    axes = topology.partition(":")[2].count("x") + 1
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology,
        chip_config_name=chip,
        chips_per_host_bounds=(2, 2, 1),
        num_slices=slices,
        wrap=tuple(rings and axis < axes for axis in range(3)),
    )


def _host(name: str) -> topologies.TopologyDescription:
    card, count = HOSTS[name]
    description = (CARDS / f"{card}.pbtxt").read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{count}", target_config=description
    )


@contextlib.contextmanager
def compiling_for(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Makes a mesh ambient; tokamax reads the device that it compiles for from jax's default."""
    with jax.set_mesh(mesh), jax.default_device(mesh.devices.flat[0]):
        yield
