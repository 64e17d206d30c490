"""A pretrained model in files, whatever their format: its configuration now, its parameters when they are asked for.

Parameters have our names (docs/architecture.md) and the dtype they are stored in; `read` makes them float32.
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np
from etils import epath

from mod_jax.config import DecoderConfig, ModelConfig, VisionConfig, require
from mod_jax.models import llava

Config = ModelConfig | DecoderConfig | VisionConfig
PARTS = {
    VisionConfig: "vision_tower",
    DecoderConfig: "language_model",
    ModelConfig: "llava",
}  # what a configuration is of
TABLES = ("language_model.embedding.w_vd", "language_model.head.w_vd")


class Parameter(Protocol):
    """A parameter in a file; `np.asarray` reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def blocks(self, indices: list[tuple[slice, ...]]) -> list[np.ndarray]:
        """Reads the parts that `indices` name (a slice a dimension)."""

    def __array__(self, dtype=None, copy=None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A parameter that is there already, as one in a file."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def blocks(self, indices) -> list[np.ndarray]:
        """The parts that `indices` name."""
        return [self.array[index] for index in indices]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.array, dtype)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained model, or a part of one.

    Attributes:
      config: of a whole model, a language model or a vision tower; None of an adaptor.
      params: name -> parameter, readable while the files are open.
      origin: for people: where it came from.
      folder: where its tokenizer and image processor are; None if it has none.
    """

    config: Config | None
    params: Mapping[str, Parameter]
    origin: str
    folder: epath.Path | pathlib.Path | None

    @property
    def size(self) -> int:
        """Numbers in all parameters."""
        return sum(math.prod(parameter.shape) for parameter in self.params.values())

    @property
    def dtype(self) -> str:
        """In which most numbers are stored."""
        sizes = collections.Counter()
        for parameter in self.params.values():
            sizes[str(parameter.dtype)] += math.prod(parameter.shape)
        return sizes.most_common(1)[0][0]


def read(pretrained: Pretrained) -> dict[str, np.ndarray]:
    """All parameters, f32."""
    return {
        name: np.asarray(parameter).astype(np.float32, copy=False)
        for name, parameter in pretrained.params.items()
    }


def join(
    tower: Pretrained, language_model: Pretrained, adaptor: Pretrained | None, seed: int, tokenizer
) -> Pretrained:
    """A model from a pretrained tower, a pretrained language model and an adaptor, a new one if there is none: what stage 1 starts from.

    Args:
      seed: of a new adaptor.
      tokenizer: the language model's, with `<image>`.
    Raises:
      ConfigError: if a part is of another kind, or the adaptor does not fit between the two.
    """
    for name, part, kind in (
        ("vision_tower", tower, VisionConfig),
        ("language_model", language_model, DecoderConfig),
    ):
        require(
            isinstance(part.config, kind),
            name,
            part.origin,
            f"a plain {PARTS[kind]}",
            f"It holds a {PARTS[type(part.config)]}.",
        )
    config = ModelConfig(vision=tower.config, decoder=language_model.config)
    if adaptor is None:
        key = jax.random.key(seed)
        # under jit only what is returned is made: no second language model in memory
        new = jax.jit(
            lambda key: {
                name: x
                for name, x in llava.init(config, key).items()
                if name.startswith("adaptor.")
            }
        )(key)
        params, origin = (
            {name: InMemory(np.asarray(x)) for name, x in new.items()},
            f"new adaptor, seed {seed}",
        )
    else:
        params, origin = dict(adaptor.params), adaptor.origin
        wanted = {
            name: x.shape
            for name, x in llava.abstract(config).items()
            if name.startswith("adaptor.")
        }
        found = {name: x.shape for name, x in params.items()}
        require(
            found == wanted,
            f"shapes of {origin}",
            found,
            f"{wanted}, between {tower.origin} and {language_model.origin}",
        )
    joined = Pretrained(
        config,
        {**tower.params, **params, **language_model.params},
        f"{tower.origin} + {language_model.origin} + {origin}",
        language_model.folder,
    )
    return with_vocabulary(joined, tokenizer)


def with_vocabulary(pretrained: Pretrained, tokenizer) -> Pretrained:
    """A whole model that knows its tokenizer's `<image>` and end token, with rows of the vocabulary for all its tokens.

    New rows, up to a multiple of 64, are the mean of the others: the logit of a mean row is the mean of the logits, so it never is the greatest.
    """
    config, params = pretrained.config, dict(pretrained.params)
    needed, rows = max(tokenizer.get_vocab().values()) + 1, config.decoder.vocab_size
    if needed > rows:
        rows = -(-needed // 64) * 64
        for name in TABLES:
            if name in params:
                table = np.asarray(params[name])
                mean = table.mean(0, dtype=np.float32).astype(table.dtype)
                params[name] = InMemory(
                    np.concatenate([table, np.broadcast_to(mean, (rows - len(table), len(mean)))])
                )
    config = dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, vocab_size=rows),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        end_token_id=tokenizer.eos_token_id,
    )
    return dataclasses.replace(pretrained, config=config, params=params)
