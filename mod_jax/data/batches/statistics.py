"""What a stage's data are, measured before it runs.

Every record is read once, and nothing of it is kept but its lengths.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from mod_jax.config import DataConfig, ModelConfig, SourceConfig
from mod_jax.data.batches.order import visits
from mod_jax.data.batches.packing import Room
from mod_jax.data.batches.pipeline import THREADS, open_samples
from mod_jax.data.batches.streams import Stream
from mod_jax.data.batches.workers import allow_flags, deaths
from mod_jax.data.samples.sample import Sample, Samples, Skipped
from mod_jax.data.workers import begin_worker

CHUNK = 64  # records measured at a time
CHUNKS_AHEAD = 16
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


def survey(
    config: DataConfig,
    tokenizer,
    model: ModelConfig,
    decode: bool,
    note: Callable[[SourceConfig, int, Measured | Skipped], None],
) -> list[SourceStatistics]:
    """Reads all records of all sources once, as training would.

    Args:
      config: The data.
      tokenizer: A fast Hugging Face tokenizer.
      model: As for `Batches`.
      decode: Whether pictures are decoded too; without it bad ones go unnoticed.
      note: Called with (source, number of its records, outcome) for every record, in the order of
        the sources.
    Raises:
      ConfigError: as `Batches`.
      WorkerDied: if a worker process was killed.
    """
    samples = open_samples(config, tokenizer, model, decode)
    return [
        _survey(source, samples_of_source, config.workers, note)
        for source, samples_of_source in zip(config.sources, samples)
    ]


def _survey(config: SourceConfig, samples: Samples, workers: int, note) -> SourceStatistics:
    sizes = np.zeros((len(samples), 2), np.int32)
    answers = 0
    truncated = 0
    skipped = []
    for number, outcome in enumerate(_measured(samples, workers)):
        note(config, len(samples), outcome)
        if isinstance(outcome, Skipped):
            skipped.append(outcome)
        else:
            sizes[number] = outcome.size
            answers += outcome.answers
            truncated += outcome.truncated
    return SourceStatistics(config, sizes, answers, truncated, tuple(skipped))


def _measured(samples: Samples, workers: int) -> Iterator[Measured | Skipped]:
    """Measures all samples in their order, in threads or in worker processes."""
    chunks = grain.MapDataset.source(samples).map(_measure).batch(CHUNK, batch_fn=list)
    reading = chunks.to_iter_dataset(grain.ReadOptions(THREADS, CHUNKS_AHEAD))
    allow_flags()
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=CHUNKS_AHEAD)
    iterator = iter(reading.mp_prefetch(options, begin_worker))
    try:
        with deaths(workers):
            for chunk in iterator:
                yield from chunk
    finally:
        iterator.close()


def _measure(outcome: Sample | Skipped) -> Measured | Skipped:
    if isinstance(outcome, Skipped):
        return outcome
    answers = int(np.count_nonzero(outcome.tokens.loss_weights))
    return Measured(outcome.size, answers, outcome.truncated)


class Packing(NamedTuple):
    """How samples fill rows.

    Attributes:
      padding: share of positions.
      samples_a_row: on average.
    """

    padding: float
    samples_a_row: float


def packing(config: DataConfig, statistics: Sequence[SourceStatistics]) -> Packing:
    """Packs an epoch (within LEAST_PACKED and MOST_PACKED samples) as a stream of the training does.

    Only the lengths of the samples are needed.
    """
    used = sum(len(source.used) for source in statistics)
    if not used:
        return Packing(1.0, 0.0)
    room = Room(config.sequence_length, config.images_per_row, config.samples_per_row)
    order = visits(config, [_Sizes(source.sizes) for source in statistics])
    endless_patience = sys.maxsize
    stream = Stream(0, order, room, config.look_ahead, 0, endless_patience, Stream.beginning())
    rows = iter(stream)
    for _ in range(config.look_ahead):  # until the samples that wait are the usual, hard ones
        next(rows)
    filled = samples = count = 0
    while samples < min(max(used, LEAST_PACKED), MOST_PACKED):
        row = next(rows).samples
        filled += sum(sample.size[0] for sample in row)
        samples += len(row)
        count += 1
    return Packing(1 - filled / (count * room.positions), samples / count)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """A random-access source of measured samples: their sizes are all that is known."""

    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Measured | Skipped:
        positions, pictures = self.sizes[index].tolist()
        if not positions:
            return Skipped(index, "", "")
        return Measured((positions, pictures), 0, False)
