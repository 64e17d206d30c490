"""Pretrained models in: whatever a folder holds, read from what is in it."""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np

from mod_jax.config import ModelConfig, ModelSource, require
from mod_jax.interop import huggingface, native
from mod_jax.interop.pretrained import PARTS, Config, Pretrained, join, read


@contextlib.contextmanager
def open_pretrained(path, vision_tower=None, tokenizer=None) -> Iterator[Pretrained]:
    """A pretrained model, or a part of one, in a folder of ours (`native`) or of Hugging Face's; its files are open inside the context.

    Args:
      path: the folder.
      vision_tower: folder of the tower, for a folder that lacks its own (original LLaVA).
      tokenizer: folder of the tokenizer, for such a folder that has none.
    Raises:
      ConfigError: listing what is wrong with its files, or why our model cannot compute what it does.
    """
    with (
        native.open_native(path)
        if native.is_native(path)
        else huggingface.open_folder(path, vision_tower, tokenizer) as pretrained
    ):
        yield pretrained


def load(path, vision_tower=None, tokenizer=None) -> tuple[Config, dict[str, np.ndarray]]:
    """The configuration (of a part, if that is what the folder holds) and f32 parameters. Arguments and errors as of `open_pretrained`."""
    with open_pretrained(path, vision_tower, tokenizer) as pretrained:
        return pretrained.config, read(pretrained)


@contextlib.contextmanager
def open_adaptor(path) -> Iterator[Pretrained]:
    """The adaptor in a file or folder of Hugging Face's or original LLaVA's (`huggingface.open_adaptor`), or of the whole model in a folder of ours."""
    with (
        native.open_native(path)
        if native.is_native(path)
        else huggingface.open_adaptor(path) as pretrained
    ):
        adaptor = {
            name: parameter
            for name, parameter in pretrained.params.items()
            if name.startswith("adaptor.")
        }
        require(
            bool(adaptor),
            "adaptor",
            str(path),
            "a whole model, or an adaptor alone",
            "It has none.",
        )
        yield Pretrained(None, adaptor, pretrained.origin, None)


@contextlib.contextmanager
def open_source(source: ModelSource, tokenizer=None) -> Iterator[Pretrained]:
    """The whole model that a configuration names by folders: one, or parts (`join`).

    Args:
      source: without `random`.
      tokenizer: of parts, with `<image>`.
    Raises:
      ConfigError: if a folder holds another kind, or as `open_pretrained`.
    """
    with contextlib.ExitStack() as files:
        if source.folder:
            pretrained = files.enter_context(
                open_pretrained(source.folder, source.vision_tower or None)
            )
            kind = PARTS[type(pretrained.config)]
            expected = "a whole model (vision tower, adaptor, language model)"
            require(
                isinstance(pretrained.config, ModelConfig),
                "folder",
                source.folder,
                expected,
                f"It holds a plain {kind}: name it as `{kind}`.",
            )
            yield dataclasses.replace(pretrained, origin=source.folder)
        else:
            tower, language_model = (
                files.enter_context(open_pretrained(path))
                for path in (source.vision_tower, source.language_model)
            )
            adaptor = files.enter_context(open_adaptor(source.adaptor)) if source.adaptor else None
            yield join(tower, language_model, adaptor, source.seed, tokenizer)
