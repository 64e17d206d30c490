"""One record, read and decoded: a Sample, or why it is none."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from mod_jax.config import DataConfig, VisionConfig
from mod_jax.data.samples.pixels import load_image
from mod_jax.data.samples.tokenizer import text_encoder
from mod_jax.data.samples.tokens import ChatFormat, Tokens, tokenize
from mod_jax.data.sources.kinds import Source
from mod_jax.data.sources.record import BadSample


@dataclasses.dataclass(frozen=True)
class Sample:
    """One record, decoded.

    Attributes:
      tokens: its positions.
      images: u8[pictures,H,W,3].
      number: of its record, through all sources.
    """

    tokens: Tokens
    images: np.ndarray
    number: int

    @property
    def size(self) -> tuple[int, int]:
        """Positions and pictures."""
        return len(self.tokens.tokens), len(self.images)

    @property
    def truncated(self) -> bool:
        """Whether its text was cut."""
        return bool(self.tokens.truncated)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that cannot be used.

    Attributes:
      number: of the record, through all sources.
      name: its id.
      reason: why.
    """

    number: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"record {self.number} ({self.name}): {self.reason}"


class Loader:
    """Reads samples of several sources; safe to call from several threads.

    Args:
      sources: in their configured order.
      config: limits, and how pictures become squares.
      tokenizer: a fast Hugging Face tokenizer.
      chat: the text format.
      vision: size and colours of pictures.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        chat: ChatFormat,
        vision: VisionConfig,
    ):
        self._sources, self._config, self._chat, self._vision = sources, config, chat, vision
        self._encoder = text_encoder(tokenizer)
        self._first = list(itertools.accumulate(map(len, sources), initial=0))

    def __call__(self, source: int, number: int, decode: bool = True) -> Sample | Skipped:
        """Reads record `number` of source `source`; without `decode` its pictures stay black."""
        place = self._first[source] + number
        try:
            return self._load(source, number, decode, place)
        except BadSample as error:
            return Skipped(place, self._sources[source].name(number), str(error))

    def _load(self, source: int, number: int, decode: bool, place: int) -> Sample:
        record, config, size = self._sources[source][number], self._config, self._vision.image_size
        if len(record.images) > config.images_per_row:
            raise BadSample(f"{len(record.images)} pictures, a row holds {config.images_per_row}")
        tokens = tokenize(record, self._encoder, self._chat, config.sequence_length)
        images = np.zeros((tokens.num_pictures, size, size, 3), np.uint8)
        if decode:
            for image, picture in zip(images, record.images):
                image[:] = load_image(picture, self._vision, config.fit)
        return Sample(tokens, images, place)
