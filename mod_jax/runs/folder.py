"""The folder of a run: its configuration, the stages that it holds, and what is written into it.

config.json   the configuration that it was started with last
stages/NAME/  what each stage leaves behind
results.json  what the evaluation measured
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Sequence

import jax
from jax.experimental import multihost_utils

from mod_jax.config import MeshConfig, RecipeConfig, from_dict, require
from mod_jax.recipe import Recipe
from mod_jax.sharding import make_mesh
from mod_jax.storage.atomic import write_json

# Key of config.json: the current folder of the command that wrote it.
STARTED_IN = "started_in"


def write_config(config: RecipeConfig, workdir: pathlib.Path) -> None:
    """Writes config.json of a run, and the folder from which its relative paths start."""
    start = str(pathlib.Path().absolute())
    write_json(workdir / "config.json", dataclasses.asdict(config) | {STARTED_IN: start})


def is_run(path) -> bool:
    """Returns whether a folder is one that `mod_jax.train` made."""
    return (pathlib.Path(path) / "config.json").is_file() and "stages" in _read_config(path)


def _read_config(folder) -> dict:
    return json.loads((pathlib.Path(folder) / "config.json").read_text())


def open_run(folder, stage: str | None = None) -> tuple[Recipe, str]:
    """Opens a run to read its students on one device, whatever it was trained on.

    Args:
      folder: Folder of the run.
      stage: Name of a stage; None for the last one.
    Returns:
      The recipe, and the name of the stage.
    Raises:
      ConfigError: if the folder is no run, or has no such stage.
    """
    require(
        is_run(folder), "run", str(folder), "a folder that mod_jax.train made, with its config.json"
    )
    values = _read_config(folder)
    start = values.pop(STARTED_IN, "")
    config = from_dict(RecipeConfig, values)
    stage = stage or config.order[-1]
    require(stage in config.stages, "stage", stage, f"one of {config.order}")
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    return Recipe(config, pathlib.Path(folder), mesh, start), stage


def check_order(config: RecipeConfig, workdir: pathlib.Path) -> None:
    """Checks that the stages that a run has trained are still there, in the same order.

    The last stage is the one that answers, so another order would exchange it unnoticed.

    Raises:
      ConfigError: if they are not.
    """
    if not is_run(workdir):
        return
    before = _read_config(workdir)["order"]
    trained = [name for name in before if (workdir / "stages" / name).is_dir()]
    require(
        [name for name in config.order if name in trained] == trained,
        "order",
        config.order,
        f"the stages that {workdir} has trained, {tuple(trained)}, in this order",
        "To run one of them alone, use --stage; for another order use another --workdir.",
    )


def following(config: RecipeConfig, name: str) -> list[str]:
    """Returns a stage, and those that start from it, directly or through others.

    Raises:
      ConfigError: if there is no such stage.
    """
    require(name in config.stages, "--redo", name, f"one of {config.order}")
    found = [name]
    for later in config.order:
        if config.stages[later].starts_from in found:
            found.append(later)
    return found


def begin(recipe: Recipe, names: Sequence[str], again: Sequence[str]) -> None:
    """Writes config.json, and removes what is trained again and results that no longer hold.

    Args:
      recipe: What will run; it has been checked.
      names: Stages that will run.
      again: Stages that are trained again, each after the one that it starts from.
    """
    if jax.process_index() == 0:
        for name in reversed(again):
            _remove(recipe.workdir / "stages" / name)
        if not all(recipe.is_finished(name) for name in names):
            (recipe.workdir / "results.json").unlink(missing_ok=True)
        write_config(recipe.config, recipe.workdir)
    multihost_utils.sync_global_devices("the folder of the run is ready")


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder so that it is whole under its name, or not there."""
    removed = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed)
