"""Measures the data of a stage before it runs.

Every record is read once, and only its lengths are kept.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import grain
import numpy as np

from mod_jax.config import DataConfig, ModelConfig, SourceConfig
from mod_jax.data.batches.order import visits
from mod_jax.data.batches.packing import Room
from mod_jax.data.batches.pipeline import THREADS, open_samples
from mod_jax.data.batches.streams import Stream
from mod_jax.data.batches.workers import allow_flags, worker_failures
from mod_jax.data.samples.sample import Sample, Samples, Skipped
from mod_jax.data.sources.unused_keys import UnusedKeys
from mod_jax.data.workers import begin_worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 64  # records that are measured at a time
CHUNKS_AHEAD = 16  # chunks that are read ahead
# Number of samples that are packed: fewer say little, and more do not change the shares.
LEAST_PACKED = 500
MOST_PACKED = 20_000


class Measured(NamedTuple):
    """The lengths of a sample.

    Attributes:
      size: (number of positions, number of pictures).
      answers: Number of positions whose target belongs to an answer.
      truncated: Whether its text was cut to fit the row.
      unused: Keys of its entry that training does not use.
    """

    size: tuple[int, int]
    answers: int
    truncated: bool
    unused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SourceStatistics:
    """The lengths of all records of a source.

    Attributes:
      config: Configuration of the source.
      sizes: i32[records,2], positions and pictures of each record; zeros for a skipped one.
      answers: Number of positions whose target belongs to an answer.
      truncated: Number of records whose text was cut to fit the row.
      skipped: The records that cannot be used.
      unused: Keys of the others that training does not use.
    """

    config: SourceConfig
    sizes: np.ndarray
    answers: int
    truncated: int
    skipped: tuple[Skipped, ...]
    unused: UnusedKeys

    @property
    def used(self) -> np.ndarray:
        """i32[used records,2], sizes of the records that can be used."""
        return self.sizes[self.sizes[:, 0] > 0]


# Is called with (source, number of its records, outcome of one record).
Note = Callable[[SourceConfig, int, Measured | Skipped], None]


def survey(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    model: ModelConfig,
    decode: bool,
    note: Note,
) -> list[SourceStatistics]:
    """Reads all records of all sources once, as training would.

    Args:
      config: Sources and limits.
      tokenizer: A fast Hugging Face tokenizer.
      model: As for `Batches`.
      decode: Whether pictures are decoded too. Without it, bad ones go unnoticed.
      note: Called with (source, number of its records, outcome) for every record, in the order of
        the sources.
    Raises:
      ConfigError: As for `Batches`.
      WorkerDied: If a worker process was killed.
    """
    samples = open_samples(config, tokenizer, model, decode)
    return [
        _survey(source, samples_of_source, config.workers, note)
        for source, samples_of_source in zip(config.sources, samples)
    ]


def _survey(config: SourceConfig, samples: Samples, workers: int, note: Note) -> SourceStatistics:
    sizes = np.zeros((len(samples), 2), np.int32)
    answers = 0
    truncated = 0
    skipped = []
    unused = UnusedKeys()
    for index, outcome in enumerate(_measured(samples, workers)):
        note(config, len(samples), outcome)
        if isinstance(outcome, Skipped):
            skipped.append(outcome)
        else:
            sizes[index] = outcome.size
            answers += outcome.answers
            truncated += outcome.truncated
            unused.add(outcome.unused)
    return SourceStatistics(config, sizes, answers, truncated, tuple(skipped), unused)


def _measured(samples: Samples, workers: int) -> Iterator[Measured | Skipped]:
    """Measures all samples in their order, in threads or in `workers` processes."""
    chunks = grain.MapDataset.source(samples).map(_measure).batch(CHUNK, batch_fn=list)
    reading = chunks.to_iter_dataset(grain.ReadOptions(THREADS, CHUNKS_AHEAD))
    allow_flags()
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=CHUNKS_AHEAD)
    iterator = iter(reading.mp_prefetch(options, begin_worker))
    try:
        with worker_failures(workers):
            for chunk in iterator:
                yield from chunk
    finally:
        iterator.close()


def _measure(outcome: Sample | Skipped) -> Measured | Skipped:
    if isinstance(outcome, Skipped):
        return outcome
    answers = int(np.count_nonzero(outcome.tokens.loss_weights))
    return Measured(outcome.size, answers, outcome.truncated, outcome.unused)


class Packing(NamedTuple):
    """How samples fill rows.

    Attributes:
      padding: Share of positions that stay empty.
      samples_a_row: Mean number of samples in a row.
    """

    padding: float
    samples_a_row: float


def packing(config: DataConfig, statistics: Sequence[SourceStatistics]) -> Packing:
    """Packs as many samples as an epoch has, as a stream does in training.

    Their number is kept within LEAST_PACKED and MOST_PACKED. Only the lengths of the samples are
    needed, so no record is read.
    """
    used = sum(len(source.used) for source in statistics)
    if not used:
        return Packing(1.0, 0.0)
    room = Room.of_row(config)
    order = visits(config, [_Sizes(source.sizes) for source in statistics])
    beginning = Stream.beginning(len(statistics))
    stream = Stream(0, order, room, config.look_ahead, 0, beginning)
    rows = (row.samples for row in stream if row.samples)
    # The first rows choose among fresh samples. After some rows, those that are hard to fit wait.
    for _ in range(config.look_ahead):
        next(rows)
    filled = 0
    samples = 0
    count = 0
    while samples < min(max(used, LEAST_PACKED), MOST_PACKED):
        row = next(rows)
        filled += sum(sample.size[0] for sample in row)
        samples += len(row)
        count += 1
    return Packing(1 - filled / (count * room.positions), samples / count)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """A random-access source of samples of which only the sizes are known.

    Attributes:
      sizes: i32[records,2], positions and pictures; zeros for a record that cannot be used.
    """

    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Measured | Skipped:
        positions, pictures = self.sizes[index].tolist()
        if not positions:
            return Skipped(index, "", "")
        return Measured((positions, pictures), 0, False)
