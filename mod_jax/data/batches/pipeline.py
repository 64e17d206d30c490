"""The input pipeline: sources -> shuffled, endless, mixed samples -> packed batches.

The order of samples is dealt to `data.streams` independent streams, each of which packs its own
rows; a global batch consists of the next rows of every stream. So batches depend on the
configuration and the step alone, and not on how many hosts and worker processes read them.
"""

import itertools
import math

import grain

from mod_jax.batch import Batch
from mod_jax.config import DataConfig, ModelConfig, require
from mod_jax.data.batches.order import visits
from mod_jax.data.batches.packing import Room, to_batch
from mod_jax.data.batches.skips import Skips, longest_bad_run
from mod_jax.data.batches.streams import RoundRobin, Row, Stream
from mod_jax.data.batches.workers import deaths, in_process
from mod_jax.data.samples.pixels import FITS
from mod_jax.data.samples.sample import Samples
from mod_jax.data.samples.tokens import chat_format
from mod_jax.data.sources.kinds import open_source

MOST_STREAMS = 64  # unless configured: each stream holds `data.look_ahead` samples in memory
THREADS = 4  # decoding releases Python's lock; tokenizing and copying do not


def count_streams(config: DataConfig, rows: int, processes: int) -> int:
    """Returns the number of streams that make batches of `rows` rows.

    Raises:
      ConfigError: if the streams do not divide the rows, or the processes do not divide the streams.
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
        f"a multiple of the {processes} processes, which share them",
        "It decides the batches: set it before the run.",
    )
    return streams


def open_samples(
    config: DataConfig, tokenizer, model: ModelConfig, decode: bool = True
) -> list[Samples]:
    """Opens the sources of a stage, as Grain random-access sources of samples.

    Raises:
      ConfigError: for sources that cannot be opened, and for impossible limits.
    """
    chat = chat_format(config.template, model, tokenizer)
    require(config.fit in FITS, "data.fit", config.fit, f"one of {tuple(FITS)}")
    require(
        config.images_per_row * chat.features_per_picture <= config.sequence_length,
        "data.images_per_row",
        config.images_per_row,
        f"pictures of {chat.features_per_picture} positions that fit sequence_length "
        f"{config.sequence_length}",
    )
    sources = [open_source(source) for source in config.sources]
    firsts = itertools.accumulate(map(len, sources), initial=0)
    return [
        Samples(source, first, config, tokenizer, chat, model.vision, decode)
        for source, first in zip(sources, firsts)
    ]


class Batches:
    """The endless batches of a stage: an iterator over this process's rows of them.

    `Batch.samples` numbers the records in the concatenation of all sources. Nothing is read before
    the first batch.

    Args:
      config: Sources and limits.
      tokenizer: A fast Hugging Face tokenizer.
      model: Gives the pictures' size and colours, the features a picture and the special ids.
      rows: B of the global batch.
      shard: (index of this process, number of processes): each makes a block of the rows.
    Raises:
      ConfigError: for sources that cannot be opened, and for impossible limits.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer,
        model: ModelConfig,
        rows: int,
        shard: tuple[int, int] = (0, 1),
    ):
        process, processes = shard
        streams = count_streams(config, rows, processes)
        each = streams // processes
        samples = open_samples(config, tokenizer, model)
        self.sources = [source.source for source in samples]
        self._config = config
        self._order = visits(config, samples)
        self._num_streams = streams
        self._block = rows // streams  # rows that a stream gives to a batch
        self._room = Room(config.sequence_length, config.images_per_row, config.samples_per_row)
        self._image_size = model.vision.image_size
        self._padding_id = model.end_token_id
        self._states = {
            stream: Stream.beginning() for stream in range(process * each, (process + 1) * each)
        }
        self.skips = Skips(config.max_bad_share, self._states)
        self._readers: list[grain.DatasetIterator[Row]] = []

    def _read(self) -> list[grain.DatasetIterator[Row]]:
        """Returns iterators over the rows, one for each worker process, or one in this process.

        Each worker has every `workers`-th stream, and takes a block of rows from each in turn.
        """
        config = self._config
        streams = [
            Stream(
                number,
                self._order[number :: self._num_streams],
                self._room,
                config.look_ahead,
                max(1, THREADS // len(self._states)),
                longest_bad_run(config.max_bad_share),
                state,
            )
            for number, state in self._states.items()
        ]
        if not config.workers:
            return [iter(RoundRobin(streams, self._block))]
        workers = min(config.workers, len(streams))
        groups = [streams[worker::workers] for worker in range(workers)]
        return [
            iter(in_process(RoundRobin(group, self._block), self._block * len(group)))
            for group in groups
        ]

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        """Returns the next batch, in numpy arrays.

        Raises:
          TooManyBadSamples: if more records are bad than the configuration allows.
          WorkerDied: if a worker process was killed.
        """
        if not self._readers:
            self._readers = self._read()
            for reader in self._readers:
                reader.start_prefetch()
        rows = []
        for index in range(len(self._states)):
            for _ in range(self._block):
                with deaths(self._config.workers):
                    row = next(self._readers[index % len(self._readers)])
                self._states[row.stream] = row.state
                self.skips.note(row)
                rows.append(row.samples)
        return to_batch(rows, self._room, self._image_size, self._padding_id)

    def get_state(self) -> dict[int, dict]:
        """Returns the state of each stream of this process, by number, in JSON types.

        The states of all processes together are those of a single process.
        """
        return dict(self._states)

    def set_state(self, states: dict[int, dict]) -> None:
        """Continues behind the batch after which `get_state` was called, on any number of processes.

        Args:
          states: By number of the stream; those of other processes may be among them.
        """
        self.close()
        self._states = {stream: states[stream] for stream in self._states}
        self.skips.restore(self._states)

    def close(self) -> None:
        """Ends the threads or worker processes."""
        for reader in self._readers:
            reader.close()
        self._readers = []
