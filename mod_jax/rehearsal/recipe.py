"""The stages of a recipe as shapes: which models a stage trains, and its batch."""

import dataclasses

import jax

from mod_jax.batch import Batch
from mod_jax.config import ConfigError, ModelConfig, ModelSource, RecipeConfig, StageConfig
from mod_jax.data.batches.packing import Room, to_batch
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.interop import loading
from mod_jax.models.upcycle import sparse_config


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage, as shapes.

    Attributes:
      stage: Its configuration.
      student, teacher: Configurations of its models; no teacher if the objective reads none.
      batch: ShapeDtypeStructs of its global batch.
    """

    stage: StageConfig
    student: ModelConfig
    teacher: ModelConfig | None
    batch: Batch


def planned(config: RecipeConfig, stage: str, rows: int | None = None) -> Planned:
    """The shapes of a stage; no weights and no data are read.

    Args:
      config: The recipe.
      stage: Name of the stage.
      rows: Rows of the global batch; those of the stage by default.

    Raises:
      ConfigError: If a folder of the recipe cannot be read.
    """
    found = config.stages[stage]
    if rows is not None:
        found = dataclasses.replace(found, rows=rows)
    student = _student(config, stage)
    teacher = None
    if found.objective.needs_teacher:
        if config.teacher is None:
            raise ConfigError("teacher = None: expected a model source. Set config.teacher.")
        teacher = _model(config, config.teacher, "none")
    row = to_batch([()], Room.of_row(found.data), student.vision.image_size, student.end_token_id)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((found.rows, *x.shape[1:]), x.dtype), row)
    return Planned(found, student, teacher, batch)


def _student(config: RecipeConfig, name: str) -> ModelConfig:
    stage = config.stages[name]
    if stage.starts_from:
        student = _student(config, stage.starts_from)
    else:
        student = _model(config, config.student, config.remat)
    return sparse_config(student, stage.upcycle) if stage.upcycle else student


def _model(config: RecipeConfig, source: ModelSource, remat: str) -> ModelConfig:
    if source.random:
        found = source.random
    else:
        with loading.open_source(source, load_tokenizer(config.tokenizer)) as pretrained:
            found = pretrained.config
    return dataclasses.replace(found, dtype=config.dtype, remat=remat)
