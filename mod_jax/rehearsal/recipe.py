"""A stage of a recipe in shapes alone, to compile its step before any folder of it is here."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from mod_jax.batch import Batch
from mod_jax.config import ModelConfig, ModelSource, RecipeConfig, StageConfig, require
from mod_jax.data.batches.packing import batch_shapes
from mod_jax.data.samples.tokenizer import READERS, load_tokenizer
from mod_jax.interop.folder import read_json
from mod_jax.interop.huggingface import config_from_json
from mod_jax.interop.loading import read_model_config
from mod_jax.interop.pretrained import (
    Config,
    config_of_kind,
    config_with_vocabulary,
    join_configs,
)
from mod_jax.recipe import check_length, check_towers, student_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PUBLISHED = pathlib.Path(__file__).with_name("published")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage of a recipe, in shapes.

    Attributes:
      stage: Its configuration.
      student: Configuration of its student, upcycled where a stage up to this one says so.
      teacher: Configuration of its teacher; None if the objective needs none.
      batch: A global batch of ShapeDtypeStructs.
    """

    stage: StageConfig
    student: ModelConfig
    teacher: ModelConfig | None
    batch: Batch


def planned(config: RecipeConfig, stage: str, rows: int | None = None) -> Planned:
    """Returns what a stage would run, as far as its shapes go.

    Of a model's folder only config.json is read. In place of a folder that is not here, the
    published config.json of the same name is taken (`published/`); without a tokenizer, `<image>`
    and the end token have Qwen's ids.

    Args:
      config: Configuration of the recipe.
      stage: Name of the stage.
      rows: Rows of the global batch in place of the stage's own.
    Raises:
      ConfigError: If a folder is not here and has no published name, or the models do not fit each
        other or the stage.
    """
    require(stage in config.stages, "stage", stage, f"one of {config.order}")
    settings = config.stages[stage]
    if rows is not None:
        settings = dataclasses.replace(settings, rows=rows)
    is_here = any((pathlib.Path(config.tokenizer) / file).is_file() for file in READERS)
    tokenizer = load_tokenizer(config.tokenizer) if is_here else None
    first = _model("student", config.student, tokenizer)
    first = dataclasses.replace(first, dtype=config.dtype, remat=config.remat)
    student = student_at(config, stage, first)
    check_length(stage, settings, student, "the student")
    teacher = None
    if settings.objective.needs_teacher and config.teacher:
        teacher = _model("teacher", config.teacher, tokenizer)
        teacher = dataclasses.replace(teacher, dtype=config.dtype, remat="none")
        check_towers(student, teacher)
        check_length(stage, settings, teacher, "the teacher")
    batch = batch_shapes(settings.data, settings.rows, student)
    return Planned(settings, student, teacher, batch)


def _model(
    key: str, source: ModelSource, tokenizer: "PreTrainedTokenizerFast | None"
) -> ModelConfig:
    """Configuration of the model that a recipe names under `key`."""
    if source.random:
        return source.random
    if source.folder:
        config = _config(f"{key}.folder", source.folder, source.vision_tower, tokenizer)
        return config_of_kind(ModelConfig, config, f"{key}.folder", source.folder)
    tower = _config(f"{key}.vision_tower", source.vision_tower)
    language_model = _config(f"{key}.language_model", source.language_model)
    joined = join_configs(tower, language_model, source.vision_tower, source.language_model)
    return config_with_vocabulary(joined, tokenizer) if tokenizer else joined


def _config(
    key: str,
    folder: str,
    vision_tower: str = "",
    tokenizer: "PreTrainedTokenizerFast | None" = None,
) -> Config:
    """Configuration of the model in a folder, or of the published model of the same name."""
    if pathlib.Path(folder).is_dir():
        return read_model_config(folder, vision_tower or None, tokenizer)
    file = PUBLISHED / f"{pathlib.Path(folder).name}.json"
    names = sorted(path.stem for path in PUBLISHED.glob("*.json"))
    require(
        file.is_file(),
        key,
        folder,
        f"a folder that is here, or one with the name of a published model ({', '.join(names)})",
        "Its config.json alone is enough: download that.",
    )
    return config_from_json(read_json(file), file.with_suffix(""))
