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
    """

    topology: str
    chip: str = "default"


# Names as in Google Cloud, by cores; a v5p chip of two cores is one device.
SLICES = {
    "v5e-4": Slice("v5e:2x2"),
    "v5e-16": Slice("v5e:4x4"),
    "v5e-64": Slice("v5e:8x8"),
    "v5p-32": Slice("v5:2x2x4", "megacore"),
    "v6e-16": Slice("v6e:4x4"),
}
# Name -> (file in cards/, GPUs of the host). Descriptions of cards are those of the XLA project.
HOSTS = {"h100-1": ("h100", 1), "h100-8": ("h100", 8)}
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


def devices(name: str) -> list[jax.Device]:
    """Devices of a slice or a host, which exist for the compiler alone.

    Raises:
      ConfigError: If the name is unknown, or its compiler is not installed.
    """
    require(name in NAMES, "topology", name, "one of " + ", ".join(NAMES))
    try:
        return list((_slice if name in SLICES else _host)(name).devices)
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        remedy = "pip install jax[tpu]" if name in SLICES else "pip install -r requirements-gpu.txt"
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"topology = {name!r}: expected an installed compiler for it. Try {remedy}. "
            f"JAX says: {reason}"
        ) from error


def _slice(name: str) -> topologies.TopologyDescription:
    topology, chip = SLICES[name]
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology,
        chip_config_name=chip,
        chips_per_host_bounds=(2, 2, 1),
        num_slices=1,
        wrap=(False, False, False),  # along no axis do the links form a ring
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
