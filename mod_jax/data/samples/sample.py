"""Turns records into samples (tokens and decoded pictures), or says why a record is skipped."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from mod_jax.config import DataConfig, VisionConfig
from mod_jax.data.samples.pixels import load_image
from mod_jax.data.samples.tokenizer import TextEncoder, text_encoder
from mod_jax.data.samples.tokens import ChatFormat, Tokens, tokenize
from mod_jax.data.sources.kinds import Source
from mod_jax.data.sources.record import BadSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Sample:
    """One record, tokenized and decoded.

    Attributes:
      tokens: The sequence positions that the sample occupies.
      images: u8[N,H,W,3], its N pictures.
      number: Index of the record in the concatenation of all sources.
      unused: Keys of its entry that carry nothing for training.
    """

    tokens: Tokens
    images: np.ndarray
    number: int
    unused: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(number of positions, number of pictures)."""
        return len(self.tokens.tokens), len(self.images)

    @property
    def truncated(self) -> bool:
        """Whether the text was cut to fit the row."""
        return bool(self.tokens.truncated)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that cannot be used.

    Attributes:
      number: Index of the record in the concatenation of all sources.
      name: The record's id.
      reason: Why it cannot be used.
    """

    number: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"record {self.number} ({self.name}): {self.reason}"


@dataclasses.dataclass(frozen=True)
class Samples:
    """The samples of one source, as a Grain random-access source (`__len__` and `__getitem__`).

    Reading is thread-safe. A pickle holds no open files, so another process opens its own.

    Attributes:
      source: The records.
      first: Index of the source's first record in the concatenation of all sources.
      config: Limits of a row, and how pictures become squares.
      tokenizer: A fast Hugging Face tokenizer.
      chat: The text format.
      vision: Size and colours of the pictures.
      decode: Whether pictures are decoded. Without it they stay black, and bad ones go unnoticed.
    """

    source: Source
    first: int
    config: DataConfig
    tokenizer: "PreTrainedTokenizerFast"
    chat: ChatFormat
    vision: VisionConfig
    decode: bool = True

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample | Skipped:
        try:
            return self._load(index)
        except BadSample as error:
            return Skipped(self.first + index, self.source.name(index), str(error))

    def _load(self, index: int) -> Sample:
        record = self.source[index]
        if len(record.images) > self.config.images_per_row:
            raise BadSample(
                f"{len(record.images)} pictures, but a row holds {self.config.images_per_row} "
                "(data.images_per_row)"
            )
        tokens = tokenize(record, self._encoder, self.chat, self.config.sequence_length)
        size = self.vision.image_size
        images = np.zeros((tokens.num_pictures, size, size, 3), np.uint8)
        if self.decode:
            for image, picture in zip(images, record.images):
                image[:] = load_image(picture, self.vision, self.config.fit)
        return Sample(tokens, images, self.first + index, record.unused)

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        return text_encoder(self.tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled tokenizers.Tokenizer loses `encode_special_tokens`, so each process makes the
        # encoder anew.
        return {name: value for name, value in self.__dict__.items() if name != "_encoder"}
