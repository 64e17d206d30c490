"""The input pipeline: sources -> shuffled, endless, mixed samples -> packed Batches, with exact resumption.

Everything follows from the configuration and its seed. Bad samples are skipped, counted and named; too many of them stop the run.
"""

import base64
import logging
import threading
import zlib

import grain
import numpy as np

from mod_jax.config import DataConfig, ModelConfig, require
from mod_jax.data.conversation import TEMPLATES, ChatFormat, tokenize
from mod_jax.data.images import load_image
from mod_jax.data.packing import PER_POSITION, pack
from mod_jax.data.sources import BadSample, Source, open_source
from mod_jax.data.tokenizer import text_encoder

LEAST_SEEN = 50  # records before the share of bad ones is judged
READ_AHEAD = 64  # samples decoded while the devices compute
UNSEEN, GOOD, TRUNCATED, BAD = range(4)

log = logging.getLogger(__name__)


class TooManyBadSamples(RuntimeError):
    """More records are bad than `data.max_bad_share` allows."""


class Skips:
    """What became of each record. Counts records, not visits: epochs, resumption and read-ahead count nothing twice. Thread-safe."""

    def __init__(self, max_bad_share: float):
        self._limit, self._lock, self._fate, self._bad, self._total = max_bad_share, threading.Lock(), bytearray(), {}, None

    def expect(self, total: int) -> None:
        """Sets the number of records there are: a set without a single good one must not be searched for ever."""
        self._total = total

    def note(self, number: int, fate: int, name: str = "", reason: str = "") -> None:
        """Records the fate of a record.

        Raises:
          TooManyBadSamples: once at least LEAST_SEEN records were seen and the share of bad ones passes the limit, or if all are bad.
        """
        with self._lock:
            self._fate.extend(bytes(max(0, number + 1 - len(self._fate))))
            is_new, self._fate[number] = self._fate[number] == UNSEEN, fate
            if fate != BAD or not is_new:
                return
            self._bad[number] = f"{name}: {reason}"
            log.warning("skipped record %d (%s): %s", number, name, reason)
            seen = len(self._fate) - self._fate.count(UNSEEN)
            if (seen >= LEAST_SEEN and len(self._bad) > self._limit * seen) or len(self._bad) == self._total:
                some = "; ".join(list(self._bad.values())[-5:])
                raise TooManyBadSamples(f"{len(self._bad)} of {seen} records are bad, more than data.max_bad_share = {self._limit}. "
                                        f"Mend the data, or allow a larger share. The last: {some}.")

    @property
    def seen(self) -> int:
        """Records read so far."""
        return len(self._fate) - self._fate.count(UNSEEN)

    @property
    def truncated(self) -> int:
        """Records whose text was cut."""
        return self._fate.count(TRUNCATED)

    @property
    def bad(self) -> dict[int, str]:
        """Record number -> "name: reason" of each skipped record."""
        with self._lock:
            return dict(self._bad)

    def get_state(self) -> dict:
        """JSON-able state."""
        with self._lock:
            fate = base64.b64encode(zlib.compress(bytes(self._fate))).decode()
            return {"fate": fate, "bad": {str(number): text for number, text in self._bad.items()}}

    def set_state(self, state: dict) -> None:
        """Restores what get_state returned."""
        with self._lock:
            self._fate = bytearray(zlib.decompress(base64.b64decode(state["fate"])))
            self._bad = {int(number): text for number, text in state["bad"].items()}


def chat_format(template: str, model: ModelConfig) -> ChatFormat:
    """The text format of a template (name in TEMPLATES) for a model."""
    require(template in TEMPLATES, "data.template", template, f"one of {tuple(TEMPLATES)}")
    return ChatFormat(template, model.vision.num_features, model.image_token_id, model.end_token_id)


def load_sample(source: Source, number: int, encoder, chat: ChatFormat, config: DataConfig, image_size: int) -> tuple[dict, bool]:
    """One record as arrays for `packing.pack`, and whether its text was cut.

    Raises:
      BadSample: if it cannot be used.
    """
    record = source[number]
    if len(record.images) > config.images_per_row:
        raise BadSample(f"{len(record.images)} pictures, a row holds {config.images_per_row}")
    tokens = tokenize(record, encoder, chat, config.sequence_length)
    images = np.zeros((tokens.num_pictures, image_size, image_size, 3), np.uint8)
    for place, picture in zip(images, record.images):
        place[:] = load_image(picture, image_size)
    return {name: getattr(tokens, name) for name in PER_POSITION} | {"images": images}, tokens.truncated


def make_dataset(config: DataConfig, tokenizer, model: ModelConfig, rows: int, *, skips: Skips | None = None, shard: tuple[int, int] = (0, 1),
                 threads: int = 2) -> grain.IterDataset:
    """The endless stream of Batches of a stage.

    Args:
      config: sources and limits.
      tokenizer: a fast Hugging Face tokenizer.
      model: gives the picture size, the features a picture and the special ids.
      rows: B of this process.
      skips: what became of the records; one that ends the run at `config.max_bad_share` by default.
      shard: (number of this process, processes): each takes every so-manieth sample.
      threads: that read and decode.
    Returns:
      A stream of Batches of numpy arrays; `iter(...)` has Grain's get_state and set_state. `Batch.samples` numbers the records through all
      sources in their configured order.
    Raises:
      ConfigError: for sources that cannot be opened; TooManyBadSamples comes from `next`.
    """
    chat, encoder, image_size = chat_format(config.template, model), text_encoder(tokenizer), model.vision.image_size
    require(config.images_per_row * chat.features_per_picture <= config.sequence_length, "data.images_per_row", config.images_per_row,
            f"pictures of {chat.features_per_picture} positions that fit sequence_length {config.sequence_length}")
    skips = skips or Skips(config.max_bad_share)
    streams, first = [], 0
    for order, source_config in enumerate(config.sources):
        source = open_source(source_config)

        def load(number: int, source=source, first=first) -> dict | None:
            try:
                sample, truncated = load_sample(source, number, encoder, chat, config, image_size)
            except BadSample as error:
                return skips.note(first + number, BAD, source.name(number), str(error))
            skips.note(first + number, TRUNCATED if truncated else GOOD)
            return sample | {"number": np.array([first + number], np.int32)}

        streams.append(grain.MapDataset.range(len(source)).shuffle(seed=config.seed + order).repeat().map(load))
        first += len(source)
    skips.expect(first)
    mixed = grain.MapDataset.mix(streams, weights=[s.weight for s in config.sources])
    samples = mixed[shard[0] :: shard[1]].to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=READ_AHEAD))
    return pack(samples, rows=rows, length=config.sequence_length, images_per_row=config.images_per_row,
                samples_per_row=config.samples_per_row, padding_id=chat.end_token_id)
