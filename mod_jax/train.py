"""Runs a recipe: python -m mod_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Every key of the configuration can be set on the command line (--config.stages.dense_mimic.optimizer.lr=1e-5). The same
command continues a run that was stopped, at the step it last saved. --stage runs one stage alone. --dry-run reads the data
and says what they are, naming every sample that would be skipped; nothing is written.
"""

import dataclasses
import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from mod_jax.config import ConfigError, RecipeConfig, from_dict, require
from mod_jax.data.batches.skips import TooManyBadSamples
from mod_jax.data.batches.workers import WorkerDied
from mod_jax.evals import scenes
from mod_jax.recipe import Recipe
from mod_jax.report import dry_run, scores
from mod_jax.sharding import make_mesh
from mod_jax.storage.atomic import write_json

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe, a file in configs/.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, results.")
STAGE = flags.DEFINE_string(
    "stage", None, "Run only this stage; what it starts from has to be there."
)
DRY_RUN = flags.DEFINE_bool(
    "dry-run",
    False,
    "Read all data once and print their statistics; exit code 1 if too many samples are bad. Needs no --workdir.",
)
DECODE = flags.DEFINE_bool(
    "decode", True, "With --dry-run: decode the pictures too, to find the bad ones."
)


def run(config: RecipeConfig, workdir: pathlib.Path, stage: str | None = None) -> dict | None:
    """Runs the stages in order, then measures.

    Returns:
      What results.json holds; None if nothing was to be measured.
    """
    check_stage(config, stage)
    mesh = make_mesh(config.mesh)
    recipe = Recipe(config, workdir, mesh)
    recipe.check()
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", dataclasses.asdict(config))
    with jax.set_mesh(mesh):
        for name in [stage] if stage else config.order:
            recipe.run(name)
        if stage or not config.evaluation.models:
            return None
        rows = [{"model": name, **measure(recipe, name)} for name in config.evaluation.models]
        results = {"recipe": config.name, "rows": rows}
    write_json(workdir / "results.json", results)
    return results


def check_stage(config: RecipeConfig, stage: str | None) -> None:
    """Raises ConfigError unless the recipe has the stage."""
    require(stage is None or stage in config.stages, "--stage", stage, f"one of {config.order}")


def measure(recipe: Recipe, name: str) -> dict:
    """Evaluates the teacher or the student that a finished stage left behind."""
    model = (
        recipe.teacher
        if name == "teacher" and name not in recipe.config.stages
        else recipe.student_after(name)
    )
    return scenes.evaluate(recipe.config.evaluation, model.config, model.params, recipe.tokenizer)


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    require(
        pathlib.Path(path).is_file(), "--config", path, "an existing file, as those in configs/"
    )
    config = from_dict(RecipeConfig, CONFIG.value.to_dict())
    check_stage(config, STAGE.value)
    if DRY_RUN.value:
        sys.exit(
            not dry_run.run(config, (STAGE.value,) if STAGE.value else config.order, DECODE.value)
        )
    require(bool(WORKDIR.value), "--workdir", WORKDIR.value, "a folder for the run")
    results = run(config, pathlib.Path(WORKDIR.value), STAGE.value)
    if results:
        scores.print_table(results)


def parse(arguments: list[str]) -> list[str]:
    """absl's parser, where a --config.KEY that the file does not have, and a file that is not there, are expected errors too."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (AttributeError, OSError) as error:
        told = str(error).replace("\\n", " ")
        raise ConfigError(
            f"--config: expected a file that can be read and keys that it has ({' '.join(told.split())})."
        ) from None


def cli() -> None:
    """The command; an expected error is one line and exit code 1."""
    flags.mark_flags_as_required(["config"])
    try:
        app.run(main, flags_parser=parse)
    except (ConfigError, TooManyBadSamples, WorkerDied) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
