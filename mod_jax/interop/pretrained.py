"""Pretrained models in files of any format: the configuration, and parameters that are read on use.

Parameters have our names (docs/architecture.md) and the dtype that they are stored in; `read`
converts them to float32.
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import jax
import numpy as np
from etils import epath

from mod_jax.config import ConfigError, DecoderConfig, ModelConfig, VisionConfig, require
from mod_jax.data.sources.record import MARKER
from mod_jax.interop.hf_config import require_rows
from mod_jax.models import llava

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

Config = ModelConfig | DecoderConfig | VisionConfig
ConfigT = TypeVar("ConfigT", ModelConfig, DecoderConfig, VisionConfig)
ConfigT_co = TypeVar("ConfigT_co", bound=Config, covariant=True)

# Class of a configuration -> key of that kind of model, in configurations and files.
PARTS: dict[type[Config], str] = {
    VisionConfig: "vision_tower",
    DecoderConfig: "language_model",
    ModelConfig: "llava",
}
# The same for error messages.
_DESCRIPTIONS: dict[type[Config], str] = {
    VisionConfig: "a vision tower",
    DecoderConfig: "a language model",
    ModelConfig: "a whole model (vision tower, adaptor and language model)",
}
TABLES = ("language_model.embedding.w_vd", "language_model.head.w_vd")


class Parameter(Protocol):
    """A parameter in a file; `np.asarray` reads it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""

    @property
    def dtype(self) -> np.dtype:
        """Dtype that the numbers are stored in."""

    def blocks(self, indices: Iterable[tuple[slice, ...]]) -> list[np.ndarray]:
        """Reads blocks of the parameter; each is given by one slice per dimension."""

    def __array__(self, dtype=None, copy=None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A `Parameter` that is an array in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the array."""
        return self.array.dtype

    def blocks(self, indices: Iterable[tuple[slice, ...]]) -> list[np.ndarray]:
        """Views of the blocks that `indices` give."""
        return [self.array[index] for index in indices]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.array, dtype)


@dataclasses.dataclass(frozen=True)
class Pretrained(Generic[ConfigT_co]):
    """A pretrained model, or its vision tower or language model alone.

    Attributes:
      config: Configuration of the model or of the part.
      params: Name -> parameter, which can be read while the files are open.
      origin: Where it came from, for people.
      folder: Folder that may hold its tokenizer and image processor.
      end_token_ids: Ids of the tokens that end a text, of a language model alone. A whole model has
        them in its configuration.
    """

    config: ConfigT_co
    params: Mapping[str, Parameter]
    origin: str
    folder: epath.Path | pathlib.Path
    end_token_ids: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements in all parameters."""
        return sum(math.prod(parameter.shape) for parameter in self.params.values())

    @property
    def dtype(self) -> str:
        """Dtype that most elements are stored in."""
        sizes: collections.Counter[str] = collections.Counter()
        for parameter in self.params.values():
            sizes[str(parameter.dtype)] += math.prod(parameter.shape)
        return sizes.most_common(1)[0][0]


@dataclasses.dataclass(frozen=True)
class Adaptor:
    """The parameters of an adaptor alone.

    Attributes:
      params: Name -> parameter, which can be read while the files are open.
      origin: Where it came from, for people.
    """

    params: Mapping[str, Parameter]
    origin: str


def read(pretrained: Pretrained[Config] | Adaptor) -> dict[str, np.ndarray]:
    """Reads all parameters as float32 arrays, by name."""
    return {
        name: np.asarray(parameter).astype(np.float32, copy=False)
        for name, parameter in pretrained.params.items()
    }


def config_of_kind(
    kind: type[ConfigT], config: Config, key: str, place: str, remedy: str = ""
) -> ConfigT:
    """Returns `config`, checked to be of the kind of model that is needed.

    Args:
      kind: Class of configuration that is needed.
      config: Configuration of the model that is there.
      key: Key that names the model, for the error message.
      place: Value of that key.
      remedy: What to do, for the error message.

    Raises:
      ConfigError: If the model is of another kind.
    """
    if not isinstance(config, kind):
        raise ConfigError(
            f"{key} = {place!r}: expected {_DESCRIPTIONS[kind]}. "
            f"It holds {_DESCRIPTIONS[type(config)]}. {remedy}".rstrip()
        )
    return config


def decoder_of(config: Config) -> DecoderConfig | None:
    """Configuration of the language model; None for a vision tower."""
    if isinstance(config, VisionConfig):
        return None
    return config.decoder if isinstance(config, ModelConfig) else config


def with_decoder(config: Config, decoder: DecoderConfig) -> Config:
    """Replaces the configuration of the language model."""
    if isinstance(config, ModelConfig):
        return dataclasses.replace(config, decoder=decoder)
    return decoder


def join_configs(
    tower: Config, language_model: Config, tower_origin: str, language_model_origin: str
) -> ModelConfig:
    """Joins the configurations of two parts, which come from places that an error names.

    Raises:
      ConfigError: If one of them is of another kind of model.
    """
    return ModelConfig(
        vision=config_of_kind(VisionConfig, tower, "vision_tower", tower_origin),
        decoder=config_of_kind(
            DecoderConfig, language_model, "language_model", language_model_origin
        ),
    )


def join(
    tower: Pretrained[Config],
    language_model: Pretrained[Config],
    adaptor: Adaptor | None,
    seed: int,
    tokenizer: "PreTrainedTokenizerFast",
) -> Pretrained[ModelConfig]:
    """Joins a vision tower, an adaptor and a language model to the model that stage 1 starts from.

    Args:
      tower: A vision tower.
      language_model: A language model.
      adaptor: An adaptor; None initialises a new one.
      seed: Seed of a new adaptor.
      tokenizer: Tokenizer of the language model, with `<image>`.

    Raises:
      ConfigError: If a part is of another kind, or the adaptor does not fit between the two.
    """
    config = join_configs(tower.config, language_model.config, tower.origin, language_model.origin)
    if adaptor is None:
        adaptor = _new_adaptor(config, seed)
    else:
        expected = {
            name: array.shape
            for name, array in llava.abstract(config).items()
            if name.startswith("adaptor.")
        }
        found = {name: parameter.shape for name, parameter in adaptor.params.items()}
        require(
            found == expected,
            f"shapes of {adaptor.origin}",
            found,
            f"{expected}, to fit between {tower.origin} and {language_model.origin}",
        )
    joined = Pretrained(
        config,
        {**tower.params, **adaptor.params, **language_model.params},
        f"{tower.origin} + {language_model.origin} + {adaptor.origin}",
        language_model.folder,
        language_model.end_token_ids,
    )
    return with_vocabulary(joined, tokenizer)


def _new_adaptor(config: ModelConfig, seed: int) -> Adaptor:
    def init(key: jax.Array) -> dict[str, jax.Array]:
        params = llava.init(config, key)
        return {name: array for name, array in params.items() if name.startswith("adaptor.")}

    # jit only computes what is returned, so no second language model is in memory.
    arrays = jax.jit(init)(jax.random.key(seed))
    params = {name: InMemory(np.asarray(array)) for name, array in arrays.items()}
    return Adaptor(params, f"new adaptor, seed {seed}")


def with_vocabulary(
    pretrained: Pretrained[ModelConfig], tokenizer: "PreTrainedTokenizerFast"
) -> Pretrained[ModelConfig]:
    """Sets the ids of `<image>` and of the end tokens, and adds rows for tokens that have none.

    Training learns the tokenizer's end token. The others that the language model ends a text with
    end an answer too.

    New rows of the vocabulary, up to a multiple of 64, are the mean of the others. The logit of a
    mean row is the mean of the logits, so it is never the largest.
    """
    params = dict(pretrained.params)
    config = config_with_vocabulary(pretrained.config, tokenizer, pretrained.end_token_ids)
    rows = config.decoder.vocab_size
    if rows > pretrained.config.decoder.vocab_size:
        for name in TABLES:
            if name in params:
                table = np.asarray(params[name])
                mean = table.mean(0, dtype=np.float32).astype(table.dtype)
                new_rows = np.broadcast_to(mean, (rows - len(table), len(mean)))
                params[name] = InMemory(np.concatenate([table, new_rows]))
    require_rows(config, pretrained.origin)
    return dataclasses.replace(pretrained, config=config, params=params)


def config_with_vocabulary(
    config: ModelConfig, tokenizer: "PreTrainedTokenizerFast", end_token_ids: tuple[int, ...] = ()
) -> ModelConfig:
    """The configuration that `with_vocabulary` gives a model.

    Args:
      config: Configuration of the model.
      tokenizer: Tokenizer with `<image>`.
      end_token_ids: Ids of the tokens that end a text of its language model.
    """
    vocabulary = tokenizer.get_vocab()
    rows = config.decoder.vocab_size
    needed_rows = max(vocabulary.values()) + 1
    if needed_rows > rows:
        rows = -(-needed_rows // 64) * 64
    end = tokenizer.eos_token_id
    return dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, vocab_size=rows),
        image_token_id=vocabulary[MARKER],
        end_token_id=end,
        other_end_token_ids=tuple(number for number in end_token_ids if number != end),
    )
