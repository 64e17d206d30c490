"""A model with its weights, made or read as a configuration names it."""

import dataclasses
import functools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import jax
import numpy as np

from mod_jax.config import ModelConfig, ModelSource, require
from mod_jax.data.sources.record import MARKER
from mod_jax.interop import huggingface, loading
from mod_jax.interop.pretrained import read
from mod_jax.interop.processor import check_rows
from mod_jax.models import llava

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its weights, and where they came from.

    Attributes:
      config: Configuration of the model.
      params: Name -> array.
      origin: Folder or stage, for messages.
    """

    config: ModelConfig
    params: dict
    origin: str

    def identity(self, names: Iterable[str]) -> dict:
        """Returns the configuration, and the SHA-256 of the parameters `names`.

        Both are content: a model is the same wherever its folder is. What may change while a stage
        runs is left out: what is recomputed, and what ends an answer besides the token that
        training learns.
        """
        config = dataclasses.asdict(self.config)
        del config["remat"], config["other_end_token_ids"]
        arrays = {name: np.asarray(self.params[name]) for name in names}
        return {
            "config": json.loads(json.dumps(config)),  # tuples become lists, as in a checkpoint
            "checksum": huggingface.checksum(arrays),
        }


def check_tokenizer(config: ModelConfig, origin: str, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Checks that a model knows the ids of a tokenizer.

    Args:
      config: Configuration of the model.
      origin: Where the model comes from, for the message.
      tokenizer: A fast Hugging Face tokenizer.
    Raises:
      ConfigError: if it does not.
    """
    expected = {
        "image_token_id": tokenizer.convert_tokens_to_ids(MARKER),
        "end_token_id": tokenizer.eos_token_id,
    }
    for name, value in expected.items():
        require(
            getattr(config, name) == value,
            f"{name} of {origin}",
            getattr(config, name),
            f"the tokenizer's, {value}",
            "Name the tokenizer it was trained with.",
        )
    check_rows(tokenizer, config, origin)


def load_model(
    source: ModelSource, tokenizer: "PreTrainedTokenizerFast", dtype: str, remat: str
) -> Model:
    """Makes the model that a configuration names: a folder, parts, or sizes with random weights.

    Args:
      source: Where the model comes from.
      tokenizer: The tokenizer that it has to fit.
      dtype: Of the activations.
      remat: What the backward pass recomputes.
    Raises:
      ConfigError: if it does not fit the tokenizer, or as `loading.open_source`.
    """
    if source.random:
        init = jax.jit(functools.partial(llava.init, source.random))
        model = Model(
            source.random,
            init(jax.random.key(source.seed)),
            f"random weights, seed {source.seed}",
        )
    else:
        with loading.open_source(source, tokenizer) as pretrained:
            model = Model(pretrained.config, read(pretrained), pretrained.origin)
    check_tokenizer(model.config, model.origin, tokenizer)
    config = dataclasses.replace(model.config, dtype=dtype, remat=remat)
    return dataclasses.replace(model, config=config)
