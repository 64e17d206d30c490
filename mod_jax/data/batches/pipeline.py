"""The input pipeline: sources -> shuffled, endless, mixed samples -> packed Batches, with exact resumption on any number of hosts.

The order of samples is dealt to `data.streams` independent streams, each of which packs rows of its own; a global batch is the next rows of every stream. So
batches depend on the configuration and the step alone, not on how many hosts and workers read them.
"""

import functools
import math
from collections.abc import Callable

from mod_jax.batch import Batch
from mod_jax.config import DataConfig, ModelConfig, require
from mod_jax.data.batches.order import visits
from mod_jax.data.batches.packing import Room, to_batch
from mod_jax.data.batches.skips import Counts, Skips
from mod_jax.data.batches.streams import Stream
from mod_jax.data.batches.workers import Workers
from mod_jax.data.samples.pixels import FITS
from mod_jax.data.samples.sample import Loader
from mod_jax.data.samples.tokens import chat_format
from mod_jax.data.sources.kinds import Source, open_source

MOST_STREAMS = (
    64  # unless the configuration says how many: each holds `data.look_ahead` samples in memory
)


def count_streams(config: DataConfig, rows: int, processes: int) -> int:
    """The streams that make batches of `rows` rows.

    Raises:
      ConfigError: if they do not divide over the rows and the processes.
    """
    streams = config.streams or math.gcd(rows, MOST_STREAMS)
    require(
        rows % streams == 0, "data.streams", streams, f"a divisor of the {rows} rows of a batch"
    )
    require(
        streams % processes == 0,
        "data.streams",
        streams,
        f"a multiple of the {processes} processes, which share them",
        "It decides the batches: set it before the run.",
    )
    return streams


def open_sources(
    config: DataConfig, tokenizer, model: ModelConfig
) -> tuple[list[Source], Callable[[], Loader]]:
    """The sources of a stage, and what makes a reader of their samples, in this process or another.

    Raises:
      ConfigError: for sources that cannot be opened, and limits that cannot be.
    """
    chat = chat_format(config.template, model, tokenizer)
    require(config.fit in FITS, "data.fit", config.fit, f"one of {tuple(FITS)}")
    require(
        config.images_per_row * chat.features_per_picture <= config.sequence_length,
        "data.images_per_row",
        config.images_per_row,
        f"pictures of {chat.features_per_picture} positions that fit sequence_length {config.sequence_length}",
    )
    sources = [open_source(source) for source in config.sources]
    return sources, functools.partial(Loader, sources, config, tokenizer, chat, model.vision)


class Batches:
    """The endless batches of a stage: an iterator over this process's rows of them. `Batch.samples` numbers the records through all sources in their order.

    Nothing is read before the first batch.

    Args:
      config: sources and limits.
      tokenizer: a fast Hugging Face tokenizer.
      model: gives the pictures' size and colours, the features a picture and the special ids.
      rows: B of the global batch.
      shard: (number of this process, processes): each makes a block of the rows.
    Raises:
      ConfigError: for sources that cannot be opened, and limits that cannot be.
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
        self.sources, loader = open_sources(config, tokenizer, model)
        order, mine = (
            visits(config, [len(source) for source in self.sources]),
            range(process * streams // processes, (process + 1) * streams // processes),
        )
        counts = {number: Counts() for number in mine}
        self.skips = Skips(config.max_bad_share, list(counts.values()))
        self._workers, self._room = (
            Workers(loader, config.workers),
            Room(config.sequence_length, config.images_per_row, config.samples_per_row),
        )
        self._streams = {
            number: Stream(
                order[number::streams],
                self._workers.submit,
                self._room,
                config.look_ahead,
                counts[number],
                self.skips.note,
            )
            for number in mine
        }
        self._rows, self._image_size, self._padding_id = (
            rows // streams,
            model.vision.image_size,
            model.end_token_id,
        )

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        """The next batch: numpy arrays.

        Raises:
          TooManyBadSamples: if more records are bad than the configuration allows.
          WorkerDied: if a worker process was killed.
        """
        for stream in self._streams.values():
            stream.read_ahead()
        rows = [next(stream) for stream in self._streams.values() for _ in range(self._rows)]
        return to_batch(rows, self._room, self._image_size, self._padding_id)

    def get_state(self) -> dict[int, dict]:
        """Number of each stream of this process -> its state, in JSON. The states of all processes together are those of one."""
        return {number: stream.get_state() for number, stream in self._streams.items()}

    def set_state(self, states: dict[int, dict]) -> None:
        """Continues behind the batch after which get_state was asked, on whichever processes; states of others' streams may be among them."""
        for number, stream in self._streams.items():
            stream.set_state(states[number])

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()
