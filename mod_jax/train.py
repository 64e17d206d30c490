"""Runs a recipe: python -m mod_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Every key of the configuration can be set on the command line, for example
--config.stages.dense_mimic.optimizer.lr=1e-5. The same command continues a run that was stopped,
from its newest checkpoint. --stage runs one stage alone, --redo=STAGE trains a stage and those that
follow from it again. All stages are checked before the first one trains; --check stops there.
--dry-run reads the data, prints their statistics and names every sample that would be skipped.
--check and --dry-run write nothing.
"""

import contextlib
import pathlib
import signal
import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging

from mod_jax.command_line import STAGE, parse, read_recipe
from mod_jax.config import ConfigError, RecipeConfig, require
from mod_jax.data.batches.skips import TooManyBadSamples
from mod_jax.data.batches.workers import WorkerDied
from mod_jax.models import llava
from mod_jax.recipe import Recipe
from mod_jax.report import dry_run
from mod_jax.report.scores import print_table
from mod_jax.runs import folder
from mod_jax.runs.check import check, check_folders
from mod_jax.sharding import make_mesh, parameter_shardings
from mod_jax.storage.atomic import write_json
from mod_jax.storage.lock import locked
from mod_jax.training.allocator import keep_freed_memory
from mod_jax.training.log import NotFinite

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics and results."
)
REDO = flags.DEFINE_string(
    "redo",
    None,
    "Train this stage, and those that follow from it, again: their checkpoints are removed.",
)
CHECK = flags.DEFINE_bool(
    "check", False, "Check that all stages can run, as every run does first, and stop there."
)
DRY_RUN = flags.DEFINE_bool(
    "dry-run",
    False,
    "Read all data once and print their statistics. The exit code is 1 if too many samples are "
    "bad. Needs no --workdir.",
)
DECODE = flags.DEFINE_bool(
    "decode", True, "With --dry-run: decode the pictures too, to find the bad ones."
)


def run(
    config: RecipeConfig,
    workdir: pathlib.Path,
    stage: str | None = None,
    redo: str | None = None,
) -> dict | None:
    """Runs the stages in order, then evaluates the models that the recipe names.

    Args:
      config: Configuration of the recipe.
      workdir: Folder of the run.
      stage: Name of the only stage to run; None runs all, and evaluates.
      redo: Name of a stage that is trained again, as are all that follow from it.
    Returns:
      The content of results.json; None if nothing was evaluated.
    Raises:
      ConfigError: before anything is trained or written, if any stage cannot run.
    """
    with _locked(workdir) if workdir.is_dir() else contextlib.nullcontext():
        recipe, names, again = plan(config, workdir, stage, redo)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    workdir.mkdir(parents=True, exist_ok=True)
    with _locked(workdir), jax.set_mesh(recipe.mesh):
        folder.begin(recipe, names, again)
        for name in names:
            recipe.run(name)
        if stage or not config.evaluation.models:
            return None
        rows = [{"model": name, **measure(recipe, name)} for name in config.evaluation.models]
    results = {"recipe": config.name, "rows": rows}
    write_json(workdir / "results.json", results)
    return results


def _locked(workdir: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Of several hosts that run one recipe together, the first one holds the lock."""
    return locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext()


def plan(
    config: RecipeConfig, workdir: pathlib.Path, stage: str | None, redo: str | None
) -> tuple[Recipe, Sequence[str], Sequence[str]]:
    """Checks all that `run` would do, with the same arguments, and changes nothing.

    Returns:
      The recipe, the stages that run, and those of them that are trained again.
    Raises:
      ConfigError: if any stage cannot run, naming it.
    """
    check_stage(config, stage)
    require(not (stage and redo), "--redo", redo, "no --stage beside it")
    again = folder.following(config, redo) if redo else []
    folder.check_order(config, workdir)
    recipe = Recipe(config, workdir, make_mesh(config.mesh))
    names = [stage] if stage else config.order
    with jax.set_mesh(recipe.mesh):
        check(recipe, names, again, evaluates=not stage)
    return recipe, names, again


def check_stage(config: RecipeConfig, stage: str | None) -> None:
    """Raises ConfigError unless `stage` is None or a stage of the recipe."""
    require(stage is None or stage in config.stages, "--stage", stage, f"one of {config.order}")


def measure(recipe: Recipe, name: str) -> dict:
    """Evaluates the teacher, or the student that a finished stage left behind."""
    from mod_jax.evals import scenes  # imports TFDS, which only the built-in set needs

    is_teacher = name == "teacher" and name not in recipe.config.stages
    model = recipe.teacher if is_teacher else recipe.student_after(name)
    shardings = parameter_shardings(recipe.mesh, model.params, llava.axes(model.config))
    params = jax.device_put(model.params, shardings)
    return scenes.evaluate(recipe.config.evaluation, model.config, params, recipe.tokenizer)


def main(_) -> None:
    """Runs the command."""
    logging.set_verbosity(logging.WARNING)  # Orbax logs every step of a save
    config = read_recipe()
    check_stage(config, STAGE.value)
    if DRY_RUN.value:
        stages = (STAGE.value,) if STAGE.value else config.order
        sys.exit(not dry_run.run(config, stages, DECODE.value))
    check_folders(config)
    if not WORKDIR.value:
        raise ConfigError(f"--workdir = {WORKDIR.value!r}: expected a folder for the run.")
    workdir = pathlib.Path(WORKDIR.value)
    if CHECK.value:
        _, names, again = plan(config, workdir, STAGE.value, REDO.value)
        print(f"checked, and can run: {', '.join(names)}")
        if again:
            print(f"trained again would be: {', '.join(again)}")
        return
    results = run(config, workdir, STAGE.value, REDO.value)
    if results:
        print_table(results)


def cli() -> None:
    """Runs the command line; an expected error is one line and exit code 1."""
    flags.mark_flags_as_required(["config"])
    try:
        app.run(main, flags_parser=parse)
    except (ConfigError, NotFinite, TooManyBadSamples, WorkerDied) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(f"stopped: {stop or 'the same command goes on from here.'}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    cli()
