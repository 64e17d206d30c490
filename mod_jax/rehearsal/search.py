"""Tries meshes, micro-batches and remat policies on a compiler, and ranks those that fit.

One mesh and one remat policy hold for the whole recipe, so they are chosen on its heaviest stage,
the one that holds and computes most. The other stages take as few micro-batches as give a device no
more rows at a time than the winner does.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mod_jax.config import ConfigError, MeshConfig, RecipeConfig
from mod_jax.models import llava
from mod_jax.rehearsal.candidates import Candidate
from mod_jax.rehearsal.hardware import GIB, Hardware
from mod_jax.rehearsal.recipe import Planned
from mod_jax.rehearsal.stage import CompilerFailed, Rehearsed
from mod_jax.sharding import AXES, ROWS
from mod_jax.storage.atomic import write_text
from mod_jax.training.state import split_trained


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate and what the compiler made of it.

    Attributes:
      candidate: What was tried.
      found: Its program; None if the stage or the compiler refused it.
    """

    candidate: Candidate
    found: Rehearsed | None

    def fits(self, hardware: Hardware) -> bool:
        """Whether it fits."""
        return self.found is not None and self.found.memory.needed <= hardware.memory

    @property
    def seconds(self) -> tuple[float, float]:
        """Predicted seconds of a step, with and without overlap."""
        roof = self.found.roofline if self.found else None
        return (roof.step, roof.no_overlap) if roof else (math.inf, math.inf)


def heaviest(plans: Mapping[str, Planned]) -> str:
    """Name of the stage that needs most: trained weights count as they are held and computed."""

    def weight(name: str) -> float:
        plan = plans[name]
        shapes = llava.abstract(plan.student)
        sizes = {name: math.prod(array.shape) for name, array in shapes.items()}
        trained, frozen = split_trained(shapes, plan.stage.trains)
        found = 8 * sum(sizes[name] for name in trained) + sum(sizes[name] for name in frozen)
        if plan.teacher:
            found += sum(math.prod(x.shape) for x in llava.abstract(plan.teacher).values())
        return found

    return max(plans, key=weight)


def try_all(
    options: Sequence[Candidate],
    run: Callable[[Candidate], Rehearsed],
    hardware: Hardware,
    console: Console,
) -> list[Tried]:
    """Compiles candidates; returns them with those that fit first, the fastest first of all.

    Args:
      options: What to try.
      run: Compiles a candidate.
      hardware: What a device can do.
      console: Where to print how far it is.
    """
    tried = []
    for number, candidate in enumerate(options, 1):
        console.print(f"{number}/{len(options)}: {describe(candidate)}", highlight=False)
        try:
            tried.append(Tried(candidate, run(candidate)))
        except (ConfigError, CompilerFailed) as error:
            console.print(f"   {error}", highlight=False, markup=False, soft_wrap=True)
            tried.append(Tried(candidate, None))
    return sorted(tried, key=lambda one: (not one.fits(hardware), one.seconds))


def describe(candidate: Candidate) -> str:
    """One line about a candidate."""
    mesh = ", ".join(f"{axis} {getattr(candidate.mesh, axis)}" for axis in AXES)
    return f"{mesh}; accumulation {candidate.accumulation}, remat {candidate.remat}"


def print_tried(tried: Sequence[Tried], hardware: Hardware, console: Console) -> None:
    """Prints the table of what was tried."""
    table = Table(box=box.SIMPLE_HEAD)
    headings = (*AXES, "accumulation", "remat", "GiB", "fits", "step ms", "no overlap ms", "binds")
    for heading in headings:
        table.add_column(heading, justify="right")
    for one in tried:
        cells = [str(getattr(one.candidate.mesh, axis)) for axis in AXES]
        cells += [str(one.candidate.accumulation), one.candidate.remat]
        if one.found is None:
            cells += ["", "refused"]
        else:
            memory = f"{one.found.memory.needed / GIB:.2f}"
            cells += [memory, "yes" if one.fits(hardware) else "no"]
            if one.found.roofline:
                cells += [f"{seconds * 1e3:.0f}" for seconds in one.seconds]
                cells.append(one.found.roofline.binds)
        table.add_row(*cells)
    console.print(table)


def planned_with(plan: Planned, candidate: Candidate) -> Planned:
    """A stage with the micro-batches and the remat of a candidate."""
    return dataclasses.replace(
        plan,
        stage=dataclasses.replace(plan.stage, accumulation=candidate.accumulation),
        student=dataclasses.replace(plan.student, remat=candidate.remat),
    )


def with_candidate(config: RecipeConfig, chosen: Candidate, rows: int) -> RecipeConfig:
    """The recipe with a candidate's mesh and remat, and micro-batches for all of its stages.

    Args:
      config: The recipe.
      chosen: The candidate.
      rows: Rows of the global batch with which it was tried.
    """
    ways = math.prod(getattr(chosen.mesh, axis) for axis in ROWS)
    at_a_time = rows // ways // chosen.accumulation

    def fitted(name: str) -> int:
        of_device = config.stages[name].rows // ways
        counts = (n for n in range(1, of_device + 1) if of_device % n == 0)
        return next((n for n in counts if of_device // n <= at_a_time), max(1, of_device))

    stages = {
        name: dataclasses.replace(stage, accumulation=fitted(name))
        for name, stage in config.stages.items()
    }
    return dataclasses.replace(config, mesh=chosen.mesh, remat=chosen.remat, stages=stages)


def overrides(config: RecipeConfig) -> list[str]:
    """Flags that give a recipe the mesh, remat and micro-batches of this one."""
    mesh: MeshConfig = config.mesh
    flags = [f"--config.mesh.{axis}={getattr(mesh, axis)}" for axis in AXES]
    flags.append(f"--config.remat={config.remat}")
    flags += [
        f"--config.stages.{name}.accumulation={config.stages[name].accumulation}"
        for name in config.order
    ]
    return flags


def write_flags(path: pathlib.Path, flags: Sequence[str], about: str) -> None:
    """Writes flags into a file for --flagfile, which every command with a --config reads.

    A flag file needs no code that reads it, says what the command line would say, and is checked as
    the command line is: a key that a recipe does not have is an error.
    """
    write_text(path, "\n".join([f"# {about}", *flags, ""]))
