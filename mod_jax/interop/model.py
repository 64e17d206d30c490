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
from mod_jax.models import llava

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its weights, and where they came from.

    Attributes:
      config: Configuration of the model.
      params: Name -> array.
      origin: Folder or stage, for messages and for the metadata of checkpoints.
    """

    config: ModelConfig
    params: dict
    origin: str

    def identity(self, names: Iterable[str]) -> dict:
        """Returns the origin, the configuration, and the SHA-256 of the parameters `names`."""
        config = dataclasses.asdict(self.config)
        del config["remat"]  # what is recomputed may change while a stage runs
        arrays = {name: np.asarray(self.params[name]) for name in names}
        return {
            "origin": self.origin,
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
    rows = config.decoder.vocab_size
    largest = max(tokenizer.get_vocab().values())
    require(
        largest < rows,
        f"vocabulary of {origin}",
        rows,
        f"more embedding rows than the tokenizer's largest id, {largest}",
    )


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
