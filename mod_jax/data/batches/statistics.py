"""What a stage's data are, measured before it runs: every record read once, nothing kept of it but its lengths."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mod_jax.config import DataConfig, ModelConfig, SourceConfig
from mod_jax.data.batches.order import visits
from mod_jax.data.batches.packing import Room
from mod_jax.data.batches.pipeline import open_sources
from mod_jax.data.batches.skips import Counts
from mod_jax.data.batches.streams import Stream
from mod_jax.data.batches.workers import Workers
from mod_jax.data.samples.sample import Loader, Skipped

CHUNK = 64  # records a task
TASKS_AHEAD = 64
LEAST_PACKED, MOST_PACKED = 500, 20_000  # samples: fewer say little, more do not change the shares


class Measured(NamedTuple):
    """What is kept of a sample.

    Attributes:
      size: positions and pictures.
      answers: positions that are learnt.
      truncated: whether its text was cut.
    """

    size: tuple[int, int]
    answers: int
    truncated: bool


@dataclasses.dataclass(frozen=True)
class SourceStatistics:
    """One source, read once.

    Attributes:
      config: of the source.
      sizes: i32[records,2], positions and pictures of each record; zeros for a skipped one.
      answers: positions that are learnt.
      truncated: records whose text was cut.
      skipped: records that cannot be used.
    """

    config: SourceConfig
    sizes: np.ndarray
    answers: int
    truncated: int
    skipped: tuple[Skipped, ...]

    @property
    def used(self) -> np.ndarray:
        """Sizes of the records that can be used."""
        return self.sizes[self.sizes[:, 0] > 0]


class _Measurer:
    def __init__(self, make: Callable[[], Loader]):
        self._load = make()

    def __call__(self, source: int, numbers: range, decode: bool) -> list[Measured | Skipped]:
        return [self._measure(self._load(source, number, decode)) for number in numbers]

    def _measure(self, outcome) -> Measured | Skipped:
        if isinstance(outcome, Skipped):
            return outcome
        return Measured(
            outcome.size, int(np.count_nonzero(outcome.tokens.loss_weights)), outcome.truncated
        )


def survey(
    config: DataConfig,
    tokenizer,
    model: ModelConfig,
    decode: bool,
    tell: Callable[[SourceConfig, int, Measured | Skipped], None],
) -> list[SourceStatistics]:
    """Reads all records of all sources once, as training would.

    Args:
      config: of the data.
      tokenizer: a fast Hugging Face tokenizer.
      model: as for `Batches`.
      decode: whether pictures are decoded too: without it bad ones are not found.
      tell: (source, its records, what was read) is told of every record, in the order of the sources.
    Raises:
      ConfigError: as `Batches`; WorkerDied.
    """
    sources, loader = open_sources(config, tokenizer, model)
    workers = Workers(functools.partial(_Measurer, loader), config.workers)
    try:
        return [
            _survey(workers, number, len(source), decode, config.sources[number], tell)
            for number, source in enumerate(sources)
        ]
    finally:
        workers.close()


def _survey(
    workers: Workers, source: int, records: int, decode: bool, config: SourceConfig, tell
) -> SourceStatistics:
    sizes, answers, truncated, skipped = np.zeros((records, 2), np.int32), 0, 0, []
    for number, outcome in enumerate(_in_order(workers, source, records, decode)):
        tell(config, records, outcome)
        if isinstance(outcome, Skipped):
            skipped.append(outcome)
        else:
            sizes[number] = outcome.size
            answers += outcome.answers
            truncated += outcome.truncated
    return SourceStatistics(config, sizes, answers, truncated, tuple(skipped))


def _in_order(
    workers: Workers, source: int, records: int, decode: bool
) -> Iterator[Measured | Skipped]:
    chunks, reading = iter(range(0, records, CHUNK)), collections.deque()
    while True:
        while len(reading) < TASKS_AHEAD and (start := next(chunks, None)) is not None:
            reading.append(
                workers.submit(source, range(start, min(start + CHUNK, records)), decode)
            )
        if not reading:
            return
        yield from reading.popleft()()


class Packing(NamedTuple):
    """How samples fill rows.

    Attributes:
      padding: share of positions.
      samples_a_row: on average.
    """

    padding: float
    samples_a_row: float


def packing(config: DataConfig, statistics: Sequence[SourceStatistics]) -> Packing:
    """Packs an epoch (within LEAST_PACKED and MOST_PACKED samples) as a stream of the training does, by lengths alone."""
    used = sum(len(source.used) for source in statistics)
    if not used:
        return Packing(1.0, 0.0)

    def submit(source: int, number: int):
        size = tuple(map(int, statistics[source].sizes[number]))
        return lambda: Measured(size, 0, False) if size[0] else Skipped(number, "", "")

    room = Room(config.sequence_length, config.images_per_row, config.samples_per_row)
    stream = Stream(
        visits(config, [len(source.sizes) for source in statistics]),
        submit,
        room,
        config.look_ahead,
        Counts(),
        lambda *_: None,
    )
    for _ in range(
        config.look_ahead
    ):  # until those who wait are those who always wait: the hard ones
        next(stream)
    filled = samples = rows = 0
    while samples < min(max(used, LEAST_PACKED), MOST_PACKED):
        row = next(stream)
        filled, samples, rows = (
            filled + sum(sample.size[0] for sample in row),
            samples + len(row),
            rows + 1,
        )
    return Packing(1 - filled / (rows * room.positions), samples / rows)
