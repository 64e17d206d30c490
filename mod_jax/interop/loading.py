"""Opens pretrained models in any supported format; the format is read from the folder."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mod_jax.config import ModelConfig, ModelSource, require
from mod_jax.interop import huggingface, native
from mod_jax.interop.folder import read_config
from mod_jax.interop.pretrained import (
    PARTS,
    Adaptor,
    Config,
    Pretrained,
    config_of_kind,
    join,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@contextlib.contextmanager
def open_pretrained(path, vision_tower=None, tokenizer=None) -> Iterator[Pretrained[Config]]:
    """Opens the model, or the part of one, in a native folder or a Hugging Face folder.

    The files are open inside the context.

    Args:
      path: The folder.
      vision_tower: Folder of the vision tower, for a folder without its own (original LLaVA).
      tokenizer: Folder of the tokenizer, for such a folder without one.

    Raises:
      ConfigError: Listing what is wrong with the files, or the options that our model does not
        compute.
    """
    if native.is_native(path):
        opened = native.open_native(path)
    else:
        opened = huggingface.open_folder(path, vision_tower, tokenizer)
    with opened as pretrained:
        yield pretrained


def read_model_config(
    path, vision_tower=None, tokenizer: "PreTrainedTokenizerFast | None" = None
) -> Config:
    """Reads the configuration of a folder's model; no weights are read or have to be there.

    Args:
      path: A native folder, or a Hugging Face folder.
      vision_tower, tokenizer: As for `huggingface.config_from_json`.

    Raises:
      ConfigError: As `huggingface.config_from_json`.
    """
    if native.is_native(path):
        return native.read_model_config(path)
    values = read_config(path)
    return huggingface.config_from_json(values, pathlib.Path(path), vision_tower, tokenizer)


@contextlib.contextmanager
def open_adaptor(path) -> Iterator[Adaptor]:
    """Opens an adaptor. The file is open inside the context.

    Args:
      path: File or folder that `huggingface.open_adaptor` takes, or a native folder with a whole
        model.

    Raises:
      ConfigError: If there is no adaptor, or as `huggingface.open_adaptor`.
    """
    if not native.is_native(path):
        with huggingface.open_adaptor(path) as adaptor:
            yield adaptor
        return
    with native.open_native(path) as pretrained:
        params = {
            name: parameter
            for name, parameter in pretrained.params.items()
            if name.startswith("adaptor.")
        }
        require(bool(params), "adaptor", str(path), "a whole model, which has an adaptor")
        yield Adaptor(params, pretrained.origin)


@contextlib.contextmanager
def open_whole(path, vision_tower=None) -> Iterator[Pretrained[ModelConfig]]:
    """Opens the whole model in a folder. Its files are open inside the context.

    Args:
      path: The folder.
      vision_tower: Folder of the vision tower, for a folder without its own (original LLaVA).

    Raises:
      ConfigError: If the folder holds only a part of a model, or as `open_pretrained`.
    """
    with open_pretrained(path, vision_tower) as pretrained:
        config = config_of_kind(
            ModelConfig,
            pretrained.config,
            "folder",
            str(path),
            f"In a recipe, name it as `{PARTS[type(pretrained.config)]}`.",
        )
        yield Pretrained(config, pretrained.params, str(path), pretrained.folder)


@contextlib.contextmanager
def open_source(
    source: ModelSource, tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Pretrained[ModelConfig]]:
    """Opens the whole model that a configuration names by its folder or by its parts (`join`).

    Args:
      source: Names of the folders; `random` is not set.
      tokenizer: Tokenizer with `<image>`, which a model of parts gets its token ids from.

    Raises:
      ConfigError: If a folder holds another kind of model, or as `open_pretrained`.
    """
    with contextlib.ExitStack() as files:
        if source.folder:
            yield files.enter_context(open_whole(source.folder, source.vision_tower or None))
        else:
            tower = files.enter_context(open_pretrained(source.vision_tower))
            language_model = files.enter_context(open_pretrained(source.language_model))
            adaptor = files.enter_context(open_adaptor(source.adaptor)) if source.adaptor else None
            yield join(tower, language_model, adaptor, source.seed, tokenizer)
