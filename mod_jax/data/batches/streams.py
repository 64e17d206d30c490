"""Streams: each packs its own sequence of visits into rows, as a Grain dataset with its own state.

A stream's rows depend on its visits alone. So the streams can be shared among any number of hosts
and worker processes, and the batches stay the same. Grain itself slices the visits among its worker
processes, so its batches would change with their number. Hence the two datasets below.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import grain

from mod_jax.data.batches.order import Visit
from mod_jax.data.batches.packing import Room, fullest
from mod_jax.data.samples.sample import Sample, Skipped
from mod_jax.data.sources.unused_keys import UnusedKeys

READ_AHEAD = 8  # samples that a stream reads ahead, beyond those that a row is chosen from
BAD_IN_A_ROW = 64  # bad records one after the other that a stream reports although it has no row


@dataclasses.dataclass
class Counts:
    """Numbers of records of a source that were read, each counted only in its first epoch.

    Attributes:
      seen: All records.
      truncated: Those whose text was cut to fit the row.
      bad: Those that cannot be used.
      unused: Keys that training does not use, and the records that have them.
    """

    seen: int = 0
    truncated: int = 0
    bad: int = 0
    unused: UnusedKeys = dataclasses.field(default_factory=UnusedKeys)

    def add(self, outcome: Sample | Skipped) -> None:
        """Counts a record."""
        self.seen += 1
        if isinstance(outcome, Skipped):
            self.bad += 1
        else:
            self.truncated += outcome.truncated
            self.unused.add(outcome.unused)

    @classmethod
    def sum(cls, counts: Iterable["Counts"]) -> Self:
        """Adds up counts of different records."""
        total = cls()
        for count in counts:
            total.seen += count.seen
            total.truncated += count.truncated
            total.bad += count.bad
            total.unused.add(count.unused.keys, count.unused.records)
        return total

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the counts of which `dataclasses.asdict` made these fields."""
        return cls(**{**fields, "unused": UnusedKeys(**fields["unused"])})


@dataclasses.dataclass(frozen=True)
class Row:
    """The samples of one row, and what happened while they were read.

    Attributes:
      stream: Number of the stream that the row belongs to.
      samples: The row's samples. Without any this is no row, but says that the last BAD_IN_A_ROW
        records were all bad, so that it can be judged whether the stream goes on.
      skipped: Bad records read since the stream's previous row.
      bad_run: Number of bad records of each source that were read since the last good record.
      state: The stream's state after this row; restoring it continues with the next row.
    """

    stream: int
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...]
    bad_run: tuple[int, ...]
    state: dict[str, Any]


class _Numbered(NamedTuple):
    """A visit and its number in the sequence of visits."""

    number: int
    visit: Visit


@dataclasses.dataclass(frozen=True)
class _Upcoming:
    """A random-access source of the `waiting` visits, then of all visits from `start` on."""

    visits: grain.MapDataset[Visit]
    waiting: tuple[int, ...]
    start: int

    def __len__(self) -> int:
        return len(self.visits) - self.start

    def __getitem__(self, index: int) -> _Numbered:
        if index < len(self.waiting):
            number = self.waiting[index]
        else:
            number = self.start + index - len(self.waiting)
        return _Numbered(number, self.visits[number])


class Stream(grain.IterDataset[Row]):
    """Packs visits into rows.

    `look_ahead` samples wait at any time. A row takes the one that has waited longest, and those of
    the others that together fill it best.

    Args:
      number: Number of the stream.
      visits: The visits that the stream reads.
      room: What a row can hold.
      look_ahead: Number of waiting samples among which a row is chosen.
      threads: Number of threads that read and decode ahead.
      state: Where to begin, from `beginning` or `StreamIterator.get_state`.
    """

    def __init__(
        self,
        number: int,
        visits: grain.MapDataset[Visit],
        room: Room,
        look_ahead: int,
        threads: int,
        state: dict[str, Any],
    ):
        super().__init__(visits)
        self.number = number
        self.visits = visits
        self.room = room
        self.look_ahead = look_ahead
        self.read_options = grain.ReadOptions(threads, READ_AHEAD)
        self.state = state

    def __iter__(self) -> "StreamIterator":
        return StreamIterator(self)

    @staticmethod
    def beginning(sources: int) -> dict[str, Any]:
        """Returns the state of a stream that has read nothing of so many sources."""
        counts = [dataclasses.asdict(Counts()) for _ in range(sources)]
        return {"next": 0, "waiting": [], "counts": counts}


class StreamIterator(grain.DatasetIterator[Row]):
    """Iterates over the rows of a stream. Its state is small: numbers of visits, and counts."""

    def __init__(self, stream: Stream):
        super().__init__()
        self._stream = stream
        self._begin(stream.state)

    def _begin(self, state: dict[str, Any]) -> None:
        start = state["next"]
        waiting = state["waiting"]
        upcoming = grain.MapDataset.source(_Upcoming(self._stream.visits, tuple(waiting), start))
        self._reader = iter(upcoming.to_iter_dataset(self._stream.read_options))
        self._next = start  # the first visit that has not been read yet
        # Visits that were waiting when the state was saved, and have not been reread yet.
        self._to_reread = collections.deque(waiting)
        self._waiting: dict[int, Sample] = {}  # visit -> sample, in the order of the visits
        self._counts = counts_of(state)
        self._bad_run = [0] * len(self._counts)

    def __next__(self) -> Row:
        skipped: list[Skipped] = []
        while len(self._waiting) < self._stream.look_ahead:
            self._read(skipped)
            if skipped and sum(self._bad_run) % BAD_IN_A_ROW == 0 and sum(self._bad_run):
                return self._row((), skipped)
        oldest, *others = self._waiting
        chosen = fullest(
            [self._waiting[visit].size for visit in others],
            self._stream.room.without(self._waiting[oldest].size),
        )
        taken = (oldest, *(others[index] for index in chosen))
        return self._row(tuple(self._waiting.pop(visit) for visit in taken), skipped)

    def _read(self, skipped: list[Skipped]) -> None:
        number, (outcome, source, first) = next(self._reader)
        if self._to_reread:
            self._to_reread.popleft()
            first = False  # it was counted before the state was saved
        else:
            self._next += 1
        if first:
            self._counts[source].add(outcome)
        if isinstance(outcome, Skipped):
            self._bad_run[source] += 1
            skipped.append(outcome)
        else:
            self._bad_run = [0] * len(self._counts)
            self._waiting[number] = outcome

    def _row(self, samples: tuple[Sample, ...], skipped: list[Skipped]) -> Row:
        run = tuple(self._bad_run)
        return Row(self._stream.number, samples, tuple(skipped), run, self.get_state())

    def get_state(self) -> dict[str, Any]:
        """Returns the next visit, the waiting visits, and the counts, in JSON types."""
        waiting = [*self._waiting, *self._to_reread]
        counts = list(map(dataclasses.asdict, self._counts))
        return {"next": self._next, "waiting": waiting, "counts": counts}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the row that preceded `get_state`; waiting samples are reread."""
        self._reader.close()
        self._begin(state)

    def start_prefetch(self) -> None:
        """Starts reading ahead in the background."""
        self._reader.start_prefetch()

    def close(self) -> None:
        """Stops the reading threads."""
        super().close()
        self._reader.close()


def counts_of(state: dict[str, Any]) -> list[Counts]:
    """Returns the counts of each source in a stream's state."""
    return [Counts.from_json(fields) for fields in state["counts"]]


class RoundRobin(grain.IterDataset[Row]):
    """Takes `block` rows from each stream in turn, in one process.

    It does what `grain.experimental.InterleaveIterDataset` does, with blocks of rows.

    Args:
      streams: The streams to take rows from.
      block: Number of rows that are taken from a stream before the next stream has its turn.
    """

    def __init__(self, streams: list[Stream], block: int):
        super().__init__(streams)
        self.streams = streams
        self.block = block

    def __iter__(self) -> "RoundRobinIterator":
        return RoundRobinIterator([iter(stream) for stream in self.streams], self.block)


class RoundRobinIterator(grain.DatasetIterator[Row]):
    """Iterates over the rows of several streams in turn."""

    def __init__(self, iterators: list[StreamIterator], block: int):
        super().__init__(iterators)
        self._iterators = iterators
        self._block = block
        self._rows = 0

    def __next__(self) -> Row:
        stream = self._rows // self._block % len(self._iterators)
        row = next(self._iterators[stream])
        self._rows += bool(row.samples)
        return row

    def get_state(self) -> dict[str, Any]:
        """Returns the number of rows so far, and the states of the streams."""
        states = [iterator.get_state() for iterator in self._iterators]
        return {"rows": self._rows, "streams": states}

    def set_state(self, state: dict[str, Any]) -> None:
        """Returns to the place at which `get_state` was called."""
        self._rows = state["rows"]
        for iterator, stream in zip(self._iterators, state["streams"], strict=True):
            iterator.set_state(stream)
