"""A model as a folder that stock transformers and vLLM load: weights, configuration, processor, and a card that says what it is."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping

from mod_jax.config import DecoderConfig, ModelConfig, require
from mod_jax.export.model_card import card_of_pretrained, card_of_run
from mod_jax.inference.processor import read_processor
from mod_jax.interop import huggingface
from mod_jax.interop.folder import PROCESSOR_FILES, SHARD_BYTES
from mod_jax.interop.loading import open_pretrained
from mod_jax.interop.pretrained import Config
from mod_jax.interop.processor import chat_template, write_processor
from mod_jax.recipe import is_run, open_run


@dataclasses.dataclass(frozen=True)
class Options:
    """How a folder is written.

    Attributes:
      dtype: float32 | bfloat16 | float16; None is float32 for a run, else what the checkpoint is stored in.
      template: name of a chat template; None is the one of the run's stage, or of the checkpoint's folder, else qwen.
      dropless: a student trained with a capacity goes out as one without.
      shard_bytes: a file of tensors grows to this size at most.
    """

    dtype: str | None = None
    template: str | None = None
    dropless: bool = False
    shard_bytes: int = SHARD_BYTES


def export(checkpoint, target, options: Options = Options(), stage: str | None = None) -> None:
    """Writes a folder; it appears whole or not at all.

    Args:
      checkpoint: a run's folder, or any that `open_pretrained` reads.
      target: must not exist.
      options: how.
      stage: of a run; None is its last.
    Raises:
      ConfigError: if transformers has no exact match for the model, a stage is not finished, or as `open_pretrained` and `huggingface.save`.
    """
    if is_run(checkpoint):
        _export_run(checkpoint, target, options, stage)
    else:
        require(stage is None, "--stage", stage, f"a run, which {checkpoint} is not")
        _export_pretrained(checkpoint, target, options)


def _export_run(run, target, options: Options, stage: str | None) -> None:
    recipe, stage = open_run(run, stage)
    student, data = recipe.student_after(stage), recipe.config.stages[stage].data
    dtype = options.dtype or "float32"

    def others(folder: pathlib.Path) -> None:
        write_processor(
            folder,
            student.config,
            recipe.tokenizer,
            chat_template(options.template or data.template),
            data.fit,
        )
        (folder / "README.md").write_text(card_of_run(recipe, stage, dtype))

    _write(target, student.config, student.params, dtype, others, options)


def _export_pretrained(checkpoint, target, options: Options) -> None:
    with open_pretrained(checkpoint) as pretrained:
        config, source, dtype = (
            pretrained.config,
            pretrained.folder,
            options.dtype or pretrained.dtype,
        )

        def others(folder: pathlib.Path) -> None:
            if isinstance(config, ModelConfig):
                own = read_processor(source, config)
                template = (
                    own.chat_template
                    if own.chat_template and not options.template
                    else chat_template(options.template or "qwen")
                )
                write_processor(folder, config, own.tokenizer, template, own.fit)
            elif isinstance(config, DecoderConfig):
                for path in (source / name for name in PROCESSOR_FILES):
                    if path.is_file():
                        shutil.copy(path, folder)
            (folder / "README.md").write_text(card_of_pretrained(pretrained, dtype))

        _write(target, config, pretrained.params, dtype, others, options)


def _write(
    target,
    config: Config,
    params: Mapping,
    dtype: str,
    others: Callable[[pathlib.Path], None],
    options: Options,
) -> None:
    if options.dropless:
        config = _dropless(config)
    huggingface.save(target, config, params, dtype, others, options.shard_bytes)


def _dropless(config: Config) -> Config:
    whole = isinstance(config, ModelConfig)
    moe = (config.decoder if whole else config).moe
    require(moe is not None, "--dropless", config, "a sparse model")
    decoder = dataclasses.replace(
        config.decoder if whole else config, moe=dataclasses.replace(moe, capacity_factor=None)
    )
    return dataclasses.replace(config, decoder=decoder) if whole else decoder
