"""Checks all stages of a recipe before the first one trains.

Files are opened, first records read, patterns matched, vocabularies and weights compared, and the
shapes of every train step followed through its models: the fourth stage should not fail after the
third has trained for a day.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from mod_jax.config import ConfigError, RecipeConfig, require
from mod_jax.data.batches.packing import batch_shapes
from mod_jax.data.samples.sample import Samples, Skipped
from mod_jax.data.samples.tokens import chat_format
from mod_jax.recipe import Plan, Recipe
from mod_jax.storage.place import is_remote
from mod_jax.training import loop

TRIED = 16  # records of a source that are read until one can be used


def check_folders(config: RecipeConfig) -> None:
    """Checks that the folders of the tokenizer and the models are here, before one is opened.

    Raises:
      ConfigError: naming the first that is missing, how to get it, and the others.
    """
    named = {"tokenizer": config.tokenizer}
    for key, source in (("student", config.student), ("teacher", config.teacher)):
        for part in ("folder", "language_model", "vision_tower", "adaptor"):
            named[f"{key}.{part}"] = getattr(source, part, "")
    missing = {
        key: path
        for key, path in named.items()
        if path and not is_remote(path) and not pathlib.Path(path).exists()
    }
    if missing:
        key, path = next(iter(missing.items()))
        others = sorted(set(missing.values()) - {path})
        raise ConfigError(
            f"{key} = {path!r}: expected an existing folder. One of the Hugging Face Hub is "
            f"downloaded by: hf download OWNER/NAME --local-dir {path}"
            + (f" (missing as well: {', '.join(others)})." if others else ".")
        )


def check(
    recipe: Recipe, names: Sequence[str], again: Sequence[str] = (), evaluates: bool = True
) -> None:
    """Checks a recipe, under its ambient mesh; changes nothing.

    Args:
      recipe: What will run.
      names: Stages that will run.
      again: Stages whose checkpoints do not count, as they are trained again.
      evaluates: Whether models are evaluated at the end.
    Raises:
      ConfigError: for the first thing that is wrong, naming the stage.
    """
    kept = [name for name in recipe.config.order if name not in again]
    for name in kept:
        with _naming(name):
            recipe.compare_settings(name)
    for name in names:
        with _naming(name):
            _check_first_records(recipe.plan(name), recipe.config, name)
    if evaluates and recipe.config.evaluation.models:
        _check_evaluation(recipe)
    for name in kept:
        with _naming(name):
            recipe.compare(name, inputs=name in names)
    for name in names:
        if name in again or not recipe.is_finished(name):
            with _naming(name):
                _trace(recipe.plan(name), recipe.config, name)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Names the stage in an error that does not."""
    try:
        yield
    except ConfigError as error:
        message = str(error)
        if f"stages.{name}" in message or f"stages/{name}" in message or f"stage {name}" in message:
            raise
        raise ConfigError(f"stage {name}: {message}") from error


def _check_first_records(plan: Plan, config: RecipeConfig, name: str) -> None:
    """Reads records of each source of a stage until one can be used.

    They are spread over the source: bad ones may lie side by side.

    Raises:
      ConfigError: if none of `TRIED` records can be used.
    """
    for source, samples in zip(config.stages[name].data.sources, plan.data.samples):
        numbers = np.unique(np.linspace(0, len(samples) - 1, TRIED).astype(int)).tolist()
        bad = list(_bad_until_good(samples, numbers))
        require(
            len(bad) < len(numbers),
            f"stages.{name}.data.sources",
            source.path,
            f"records that can be used, but all {len(numbers)} that were tried are bad",
            f"The first: {bad[0]}." if bad else "",
        )


def _bad_until_good(samples: Samples, numbers: Sequence[int]) -> Iterator[Skipped]:
    for number in numbers:
        outcome = samples[number]
        if not isinstance(outcome, Skipped):
            return
        yield outcome


def _check_evaluation(recipe: Recipe) -> None:
    """Checks that the models of the evaluation have questions, and fit its template.

    Raises:
      ConfigError: if not, naming the key.
    """
    from mod_jax.data.scenes.builder import load_scenes  # imports TFDS, which only these need

    evaluation = recipe.config.evaluation
    try:
        require(
            len(load_scenes(evaluation.path, evaluation.split)) > 0,
            "evaluation.split",
            evaluation.split,
            "a split with at least one scene",
        )
        for name in evaluation.models:
            is_stage = name in recipe.config.stages
            model = recipe.plan(name).student if is_stage else recipe.teacher.config
            chat_format(evaluation.template, model, recipe.tokenizer)
    except ConfigError as error:
        # Scenes and templates are also read for training, whose keys the errors name.
        message = str(error).replace("data.sources.", "evaluation.")
        raise ConfigError(message.replace("data.template", "evaluation.template")) from error


def _trace(plan: Plan, config: RecipeConfig, name: str) -> None:
    """Follows the shapes of a stage's step through its models.

    Raises:
      ConfigError: if they do not fit the models or the mesh.
    """
    stage = config.stages[name]
    batch = batch_shapes(stage.data, stage.rows, plan.student)
    loop.trace(plan.program, plan.trained, plan.frozen, batch)
