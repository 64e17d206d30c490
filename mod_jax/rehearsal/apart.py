"""Rehearses a stage in a process of its own, as compilers for accelerators may abort theirs.

It also gives back the memory that a compiler keeps.
"""

import concurrent.futures
import multiprocessing
import os
import pathlib
import tempfile
from concurrent.futures.process import BrokenProcessPool

from mod_jax.config import MeshConfig
from mod_jax.rehearsal import topology
from mod_jax.rehearsal.hardware import hardware
from mod_jax.rehearsal.recipe import Planned
from mod_jax.rehearsal.stage import CompilerFailed, Rehearsed, rehearse
from mod_jax.sharding import make_mesh


def rehearse_apart(
    plan: Planned, mesh: MeshConfig, on: str, slices: int = 1, quick: bool = False
) -> Rehearsed:
    """`stage.rehearse` in a process of its own.

    Args:
      plan: The stage.
      mesh: Sizes of its axes.
      on: A topology, one of `topology.NAMES`.
      slices: Number of slices.
      quick: As for `stage.rehearse`.

    Raises:
      ConfigError: If the stage does not fit the mesh.
      CompilerFailed: If the compiler aborts, or refuses for another reason than memory.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        said = pathlib.Path(folder) / "stderr"
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            try:
                return pool.submit(_run, plan, mesh, on, slices, quick, str(said)).result()
            except BrokenProcessPool:
                raise CompilerFailed(f"the compiler aborted: {_why(said)}") from None


def _run(
    plan: Planned, mesh: MeshConfig, on: str, slices: int, quick: bool, said: str
) -> Rehearsed:
    with open(said, "w") as file:
        os.dup2(file.fileno(), 2)  # what compilers write comes from C++
    topology.prepare()
    devices = topology.devices(on, slices)
    return rehearse(plan, make_mesh(mesh, devices), hardware(on), slices, quick)


def _why(said: pathlib.Path) -> str:
    """The line of what a process has said that gives the reason for its end."""
    lines = said.read_text(errors="replace").splitlines() if said.is_file() else []
    reasons = [line for line in lines if "Check failed" in line or line.startswith("F")]
    return next(iter([*reasons, *lines[-1:]]), "it said nothing")[:300]
