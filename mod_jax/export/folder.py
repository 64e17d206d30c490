"""Exports a model to a folder that stock transformers and vLLM load.

The folder has the weights, the configuration, the processor, and a model card.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from mod_jax.config import ConfigError, DecoderConfig, ModelConfig, require
from mod_jax.export.model_card import card_of_pretrained, card_of_run
from mod_jax.inference.processor import read_processor
from mod_jax.interop import huggingface
from mod_jax.interop.folder import SHARD_BYTES, copy_processor
from mod_jax.interop.loading import open_pretrained
from mod_jax.interop.pretrained import Config, decoder_of, with_decoder
from mod_jax.interop.processor import chat_template, write_processor
from mod_jax.runs.folder import is_run, open_run


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is exported.

    Attributes:
      dtype: Dtype of the tensors: float32, bfloat16 or float16. None is float32 for a run, and for
        anything else the dtype that the checkpoint is stored in.
      template: Name of a chat template. None is that of the run's stage, or of the checkpoint's
        folder, or "qwen" if the folder has none.
      dropless: Whether a student trained with an expert capacity is exported without one.
      shard_bytes: Largest size of one file of tensors, in bytes.
    """

    dtype: str | None = None
    template: str | None = None
    dropless: bool = False
    shard_bytes: int = SHARD_BYTES


def export(checkpoint, target, options: Options = Options(), stage: str | None = None) -> None:
    """Writes a folder, completely or not at all.

    Args:
      checkpoint: Folder of a run, or any folder that `open_pretrained` opens.
      target: Folder to create; it must not exist.
      options: How the model is exported.
      stage: Stage of a run; None is its last one.

    Raises:
      ConfigError: If transformers has no class that computes exactly the same, a stage is not
        finished, or as `open_pretrained` and `huggingface.save`.
    """
    if is_run(checkpoint):
        _export_run(checkpoint, target, options, stage)
    else:
        require(stage is None, "--stage", stage, f"no stage, as {checkpoint} is not a run")
        _export_pretrained(checkpoint, target, options)


def _export_run(run, target, options: Options, stage: str | None) -> None:
    recipe, stage = open_run(run, stage)
    student = recipe.student_after(stage)
    data = recipe.config.stages[stage].data
    dtype = options.dtype or "float32"

    def write_others(folder: pathlib.Path) -> None:
        template = chat_template(options.template or data.template)
        write_processor(folder, student.config, recipe.tokenizer, template, data.fit)
        (folder / "README.md").write_text(card_of_run(recipe, stage, dtype))

    _write(target, student.config, student.params, dtype, write_others, options)


def _export_pretrained(checkpoint, target, options: Options) -> None:
    with open_pretrained(checkpoint) as pretrained:
        config = pretrained.config
        dtype = options.dtype or pretrained.dtype

        def write_others(folder: pathlib.Path) -> None:
            if isinstance(config, ModelConfig):
                processor = read_processor(pretrained.folder, config, options.template)
                template = processor.chat_template
                assert template is not None, "read_processor gives every folder one"
                write_processor(folder, config, processor.tokenizer, template, processor.fit)
            elif isinstance(config, DecoderConfig):
                copy_processor(pretrained.folder, epath.Path(folder))
            (folder / "README.md").write_text(card_of_pretrained(pretrained, dtype))

        _write(
            target,
            config,
            pretrained.params,
            dtype,
            write_others,
            options,
            pretrained.end_token_ids,
        )


def _write(
    target,
    config: Config,
    params: Mapping,
    dtype: str,
    others: Callable[[pathlib.Path], None],
    options: Options,
    end_token_ids: Sequence[int] = (),
) -> None:
    if options.dropless:
        config = _dropless(config)
    huggingface.save(target, config, params, dtype, others, options.shard_bytes, end_token_ids)


def _dropless(config: Config) -> Config:
    """The configuration without an expert capacity."""
    decoder = decoder_of(config)
    if decoder is None or decoder.moe is None:
        raise ConfigError(
            "--dropless = True: expected a sparse model, but this one has no experts."
        )
    moe = dataclasses.replace(decoder.moe, capacity_factor=None)
    return with_decoder(config, dataclasses.replace(decoder, moe=moe))
