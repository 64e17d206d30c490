"""Says whether a recipe fits accelerators that are not here, how long it takes and what it costs:

    python -m mod_jax.rehearse --config=configs/llava_mod.py:qwen1.5-1.8b --topology=v5e-64

It compiles the train step of each stage with the real compiler, in an environment that has it
(`make rehearse TOPOLOGY=v5e-64 CONFIG=...`), and reads the program (docs/rehearsal.md). --search
tries meshes, micro-batches and remat policies first and goes on with the best. The last line says
`fits: X of Y GiB a chip`, or `does not fit: ...` with the exit code 1.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from jax.sharding import Mesh
from rich.console import Console

from mod_jax.command_line import STAGE, parse, read_recipe
from mod_jax.config import ConfigError, MeshConfig, RecipeConfig, require
from mod_jax.rehearsal import search, topology
from mod_jax.rehearsal.apart import rehearse_apart
from mod_jax.rehearsal.candidates import Candidate, candidates
from mod_jax.rehearsal.hardware import Hardware, hardware
from mod_jax.rehearsal.recipe import Planned, planned
from mod_jax.rehearsal.report import print_stage, print_summary, stage_report, totals, verdict
from mod_jax.rehearsal.stage import CompilerFailed, prepare
from mod_jax.sharding import AXES, make_mesh
from mod_jax.storage.atomic import write_json

TOPOLOGY = flags.DEFINE_string("topology", None, "One of " + ", ".join(topology.NAMES) + ".")
SLICES = flags.DEFINE_integer("slices", 1, "Number of such TPU slices, joined by the network.")
MESH = flags.DEFINE_list(
    "mesh", None, f"Devices along {', '.join(AXES)}; by default those of the recipe."
)
ROWS = flags.DEFINE_integer(
    "rows", None, "Rows of the global batch of every stage; by default those of the recipe."
)
PRICE = flags.DEFINE_float("price", None, "USD of an hour of a chip.")
QUICK = flags.DEFINE_bool(
    "quick", False, "Compile for TPUs with less effort. Memory differs from a run's."
)
SEARCH = flags.DEFINE_bool("search", False, "Choose mesh, micro-batches and remat first.")
CANDIDATES = flags.DEFINE_integer("candidates", 8, "With --search: how many are compiled.")
WRITE = flags.DEFINE_string(
    "write", None, "With --search: a file for what was chosen, to be read with --flagfile=FILE."
)
OUTPUT = flags.DEFINE_string("output", None, "A file for all figures, as JSON.")
WIDTH = 120  # columns where the output is not a terminal


def main(_) -> None:
    """Runs the command on the parsed flags."""
    logging.set_verbosity(logging.WARNING)
    topology.prepare()
    config = _recipe()
    on = TOPOLOGY.value or ""
    require(on in topology.NAMES, "--topology", on, "one of " + ", ".join(topology.NAMES))
    require(SLICES.value >= 1, "--slices", SLICES.value, "at least 1")
    require(bool(SEARCH.value) or not WRITE.value, "--write", WRITE.value, "--search beside it")
    require(not SEARCH.value or not MESH.value, "--mesh", MESH.value, "no --search beside it")
    devices = topology.devices(on, SLICES.value)
    a_device = hardware(on)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    names = (STAGE.value,) if STAGE.value else config.order
    if SEARCH.value:
        config = _searched(config, names, len(devices), a_device, console)
    plans = {name: planned(config, name) for name in names}
    mesh = make_mesh(config.mesh, devices)
    for name, plan in plans.items():  # all of them before the first is compiled
        _check(name, plan, mesh)
    stages = []
    for name, plan in plans.items():
        try:
            found = rehearse_apart(plan, config.mesh, on, SLICES.value, QUICK.value)
        except CompilerFailed as error:
            raise CompilerFailed(f"stage {name}: {error}") from None
        stages.append(stage_report(name, found, a_device, len(devices), PRICE.value))
        print_stage(console, stages[-1], mesh.shape)
    if len(stages) > 1:
        print_summary(console, stages)
    fits, line = verdict(stages, a_device)
    if OUTPUT.value:
        about = {
            "recipe": config.name,
            "topology": on,
            "slices": SLICES.value,
            "devices": len(devices),
            "mesh": dict(mesh.shape),
            "fits": fits,
        }
        write_json(pathlib.Path(OUTPUT.value), about | {"total": totals(stages), "stages": stages})
    print(line)
    sys.exit(not fits)


def _check(name: str, plan: Planned, mesh: Mesh) -> None:
    """Raises ConfigError, naming the stage, if it does not fit the mesh."""
    try:
        prepare(plan, mesh)
    except ConfigError as error:
        raise ConfigError(f"stage {name}: {error}") from error


def _recipe() -> RecipeConfig:
    """The recipe with the mesh and the rows of the command line."""
    config = read_recipe()
    name = STAGE.value
    require(name is None or name in config.stages, "--stage", name, f"one of {config.order}")
    if MESH.value:
        sizes = MESH.value
        is_mesh = len(sizes) == len(AXES) and all(size.lstrip("-").isdigit() for size in sizes)
        require(is_mesh, "--mesh", ",".join(sizes), f"{len(AXES)} numbers, for {', '.join(AXES)}")
        mesh = MeshConfig(**dict(zip(AXES, map(int, sizes))))
        config = dataclasses.replace(config, mesh=mesh)
    if ROWS.value:
        stages = {
            name: dataclasses.replace(stage, rows=ROWS.value)
            for name, stage in config.stages.items()
        }
        config = dataclasses.replace(config, stages=stages)
    return config


def _searched(
    config: RecipeConfig, names: Sequence[str], devices: int, a_device: Hardware, console: Console
) -> RecipeConfig:
    """The recipe with the best of what `search` tries; prints it, and writes it if it is asked to.

    Raises:
      ConfigError: If nothing that was tried fits.
    """
    plans = {name: planned(config, name) for name in names}
    name = search.heaviest(plans)
    plan = plans.pop(name)
    found = candidates(
        plan, list(plans.values()), devices, a_device, CANDIDATES.value, SLICES.value
    )
    console.rule(f"search on stage {name}")

    def run(candidate: Candidate):
        tried = search.planned_with(plan, candidate)
        return rehearse_apart(tried, candidate.mesh, TOPOLOGY.value or "", SLICES.value, True)

    tried = search.try_all(found, run, a_device, console)
    search.print_tried(tried, a_device, console)
    best = tried[0]
    if not best.fits(a_device):
        raise ConfigError(
            f"--candidates = {CANDIDATES.value}: expected one that fits {TOPOLOGY.value}; none of "
            "those tried does. Try more of them, fewer rows, or a larger slice."
        )
    config = search.with_candidate(config, best.candidate, plan.stage.rows)
    chosen = search.overrides(config)
    console.print("\n".join(chosen), highlight=False, soft_wrap=True)
    if WRITE.value:
        about = f"{config.name} on {SLICES.value} x {TOPOLOGY.value}, by mod_jax.rehearse --search"
        search.write_flags(pathlib.Path(WRITE.value), chosen, about)
    return config


def cli() -> None:
    """Runs the command line; an expected error is one line and exit code 1."""
    flags.mark_flags_as_required(["config", "topology"])
    try:
        app.run(main, flags_parser=parse)
    except (ConfigError, CompilerFailed) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
