"""What is measured: the models, the stage and the batch of a preset, or those of a recipe."""

import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from benchmarks import models
from benchmarks.sizes import PRESETS, WORK, Sizes, draw, positions_of
from mod_jax.batch import Batch
from mod_jax.config import (
    ConfigError,
    MeshConfig,
    ModelConfig,
    RecipeConfig,
    StageConfig,
    from_dict,
    require,
)
from mod_jax.models import llava
from mod_jax.models.vision import without_tower
from mod_jax.recipe import Recipe
from mod_jax.sharding import make_mesh

PRESET = flags.DEFINE_enum("preset", "tiny", PRESETS, "Sizes of models and batch.")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A recipe instead of a preset; its keys can be set as in mod_jax.train."
)
STAGE = flags.DEFINE_string("stage", None, "With --config: the stage. By default the last one.")
DTYPE = flags.DEFINE_string("dtype", "float32", "With --preset: dtype of the activations.")
REMAT = flags.DEFINE_string("remat", "auto", "With --preset: what the backward pass recomputes.")
STEPS = flags.DEFINE_integer("steps", 5, "Measured calls; figures are their medians.")
WARMUP = flags.DEFINE_integer("warmup", 2, "Calls before these.")
JSON = flags.DEFINE_string("json", None, "A file that the figures are written to as well.")


class Setting(NamedTuple):
    """All that a step needs but numbers: weights are drawn at random.

    Attributes:
      about: Names for the report.
      stage: The stage.
      student: Configuration of the student.
      teacher: Configuration of the teacher, or None.
      batch: The batch of every step.
      positions: Of the batch as a user counts them, whatever is shared and without padding.
      mesh: Mesh of the devices.
    """

    about: dict
    stage: StageConfig
    student: ModelConfig
    teacher: ModelConfig | None
    batch: Batch
    positions: int
    mesh: Mesh


def run(main: Callable) -> None:
    """Runs a command; an expected error is one line."""
    logging.set_verbosity(logging.WARNING)
    try:
        app.run(main)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def of_flags(work: str) -> Setting:
    """The setting that the command line names; `work` counts for a preset alone."""
    if CONFIG.value is None:
        return of_preset(PRESET.value, work, dtype=DTYPE.value, remat=REMAT.value)
    config = from_dict(RecipeConfig, CONFIG.value.to_dict())
    return of_recipe(config, STAGE.value or config.order[-1])


def of_preset(preset: str, work: str, **options) -> Setting:
    """The setting of a preset, on one device; `options` are keys of both ModelConfigs."""
    return of_sizes({"preset": preset}, PRESETS[preset], work, **options)


def of_sizes(about: dict, sizes: Sizes, work: str, **options) -> Setting:
    """The same for any sizes, under names of theirs."""
    require(work in WORK, "--work", work, " or ".join(WORK))
    return Setting(
        {**about, "work": work, **options},
        models.stage(work, sizes.samples),
        models.student(sizes, **options),
        models.teacher(sizes, dtype=options.get("dtype", "float32")),
        models.batch(work, draw(sizes)),
        positions_of(sizes, work),
        make_mesh(MeshConfig(), jax.devices()[:1]),
    )


def of_recipe(config: RecipeConfig, name: str) -> Setting:
    """The setting of a stage of a recipe: its sizes, and the first batch of its data."""
    require(name in config.stages, "--stage", name, f"one of {config.order}")
    mesh = make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        plan = Recipe(config, pathlib.Path(folder), mesh).plan(name)
        with contextlib.closing(plan.data):
            batch = next(plan.data)
    return Setting(
        {"recipe": config.name, "stage": name},
        config.stages[name],
        plan.student,
        plan.teacher.config if plan.teacher else None,
        batch,
        int((batch.segment_ids > 0).sum()),
        mesh,
    )


def student_shapes(setting: Setting) -> dict:
    """Name -> ShapeDtypeStruct of the student's parameters."""
    return llava.abstract(setting.student)


def teacher_shapes(setting: Setting) -> dict:
    """The same for the teacher, which reads the student's features; empty if there is none."""
    if setting.teacher is None:
        return {}
    return without_tower(llava.abstract(setting.teacher))


def drawn(config: ModelConfig, names, seed: int, shardings: dict) -> dict:
    """The named parameters of a model with random weights, made where they are needed."""

    def make(key):
        params = llava.init(config, key)
        return {name: params[name] for name in names}

    wanted = {name: shardings[name] for name in names}
    return jax.jit(make, out_shardings=wanted)(jax.random.key(seed))
