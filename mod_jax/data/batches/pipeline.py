"""The input pipeline: sources -> shuffled, endless, mixed samples -> packed batches.

The order of samples is dealt to `data.streams` independent streams, each of which packs its own
rows. A global batch consists of the next rows of every stream. So batches depend only on the
configuration and the step, not on the number of hosts and worker processes that read them.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import grain

from mod_jax.batch import Batch
from mod_jax.config import DataConfig, ModelConfig, require
from mod_jax.data.batches.order import visits
from mod_jax.data.batches.packing import Room, to_batch
from mod_jax.data.batches.skips import Skips
from mod_jax.data.batches.streams import RoundRobin, Row, Stream
from mod_jax.data.batches.workers import WorkerIterator
from mod_jax.data.samples.pixels import FITS
from mod_jax.data.samples.sample import Sample, Samples
from mod_jax.data.samples.tokens import chat_format
from mod_jax.data.sources.kinds import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Limit of the default number of streams: each holds `data.look_ahead` samples in memory.
MOST_STREAMS = 64
THREADS = 4  # more would gain little: only decoding releases Python's lock


def count_streams(config: DataConfig, rows: int, processes: int) -> int:
    """Returns the number of streams that make batches of `rows` rows.

    Raises:
      ConfigError: If the streams do not divide the rows, or the processes the streams.
    """
    streams = config.streams or math.gcd(rows, MOST_STREAMS)
    require(
        rows % streams == 0,
        "data.streams",
        streams,
        f"a divisor of the {rows} rows of a batch",
    )
    require(
        streams % processes == 0,
        "data.streams",
        streams,
        f"a multiple of the {processes} processes, which share the streams",
        "Set it before a run starts, since it determines the batches.",
    )
    return streams


def open_samples(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    model: ModelConfig,
    decode: bool = True,
) -> list[Samples]:
    """Opens the sources of a stage, as Grain random-access sources of samples.

    Args:
      config: Sources and limits.
      tokenizer: A fast Hugging Face tokenizer.
      model: As for `Batches`.
      decode: Whether pictures are decoded; see `Samples`.
    Raises:
      ConfigError: If a source cannot be opened, or the limits contradict each other.
    """
    chat = chat_format(config.template, model, tokenizer)
    require(config.fit in FITS, "data.fit", config.fit, f"one of {tuple(FITS)}")
    require(
        config.images_per_row * chat.features_per_picture <= config.sequence_length,
        "data.images_per_row",
        config.images_per_row,
        f"a number of pictures, {chat.features_per_picture} positions each, that fits into "
        f"sequence_length {config.sequence_length}",
    )
    sources = [open_source(source) for source in config.sources]
    firsts = itertools.accumulate(map(len, sources), initial=0)
    return [
        Samples(source, first, config, tokenizer, chat, model.vision, decode)
        for source, first in zip(sources, firsts)
    ]


class Batches:
    """Iterates over the endless batches of a stage, or this process's rows of them.

    `Batch.samples` numbers the records in the concatenation of all sources. No record is read
    before the first batch is requested.

    Attributes:
      samples: The samples of each source, in the configured order, for random access.
      sources: The opened sources of the samples.
      skips: The account of bad records, and of keys that are not used.

    Args:
      config: Sources and limits.
      tokenizer: A fast Hugging Face tokenizer.
      model: Gives the pictures' size and colours, the features per picture and the special ids.
      rows: Number of rows of the global batch (B).
      shard: (index of this process, number of processes); each process makes a block of the rows.
    Raises:
      ConfigError: If a source cannot be opened, or the limits contradict each other.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: "PreTrainedTokenizerFast",
        model: ModelConfig,
        rows: int,
        shard: tuple[int, int] = (0, 1),
    ):
        process, processes = shard
        streams = count_streams(config, rows, processes)
        own_streams = streams // processes
        first_stream = process * own_streams
        self.samples = open_samples(config, tokenizer, model)
        self.sources = [samples.source for samples in self.samples]
        self._config = config
        self._num_streams = streams
        self._block = rows // streams  # rows that a stream gives to a batch
        self._room = Room.of_row(config)
        self._image_size = model.vision.image_size
        self._padding_id = model.end_token_id
        self._states = {
            stream: Stream.beginning(len(self.sources))
            for stream in range(first_stream, first_stream + own_streams)
        }
        self.skips = Skips(config.max_bad_share, self.sources, self._states)
        self._readers: list[grain.DatasetIterator[Row] | WorkerIterator[Row]] = []

    def _rows(self) -> list[grain.DatasetIterator[Row] | WorkerIterator[Row]]:
        """Returns iterators over the rows: one per worker process, or a single one without workers.

        Of W workers, each has every W-th stream, and takes a block of rows from each in turn.
        """
        config = self._config
        order = visits(config, self.samples)
        streams = [
            Stream(
                number,
                order[number :: self._num_streams],
                self._room,
                config.look_ahead,
                max(1, THREADS // len(self._states)),
                state,
            )
            for number, state in self._states.items()
        ]
        if not config.workers:
            return [iter(RoundRobin(streams, self._block))]
        workers = min(config.workers, len(streams))
        groups = [streams[worker::workers] for worker in range(workers)]
        return [
            WorkerIterator(RoundRobin(group, self._block), self._block * len(group), config.workers)
            for group in groups
        ]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch, in numpy arrays.

        Raises:
          TooManyBadSamples: If more records are bad than the configuration allows.
          WorkerDied: If a worker process was killed.
        """
        if not self._readers:
            self._readers = self._rows()
            for reader in self._readers:
                reader.start_prefetch()
        rows = []
        for index in range(len(self._states)):
            for _ in range(self._block):
                rows.append(self._next_row(self._readers[index % len(self._readers)]))
        return to_batch(rows, self._room, self._image_size, self._padding_id)

    def _next_row(self, reader: Iterator[Row]) -> tuple[Sample, ...]:
        """Returns the samples of a reader's next row, and judges the bad records before it."""
        while True:
            row = next(reader)
            self._states[row.stream] = row.state
            if row.skipped:
                self.skips.note(row)
            if row.samples:
                return row.samples

    def get_state(self) -> dict[int, dict[str, Any]]:
        """Returns the state of each stream of this process, by the stream's number.

        The states are in JSON types. Those of all processes together equal those of one process
        that makes all rows.
        """
        return dict(self._states)

    def set_state(self, states: Mapping[int, dict[str, Any]]) -> None:
        """Continues after the batch that preceded `get_state`.

        The number of processes may have changed since then.

        Args:
          states: The state of each stream, by number; may include streams of other processes.
        """
        self.close()
        for stream in self._states:
            self._states[stream] = states[stream]

    def close(self) -> None:
        """Stops the reading threads or worker processes."""
        for reader in self._readers:
            reader.close()
        self._readers = []
