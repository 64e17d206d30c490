"""A stream: an endless sequence of samples, packed into rows by itself, so that its rows depend on nothing else."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence

from mod_jax.data.batches.order import Visit
from mod_jax.data.batches.packing import Room, fullest
from mod_jax.data.batches.skips import Counts
from mod_jax.data.samples.sample import Sample, Skipped

READ_AHEAD = 8  # samples that are read beyond those a row is chosen from


class Stream:
    """Rows of samples, one after the other. A row takes the sample that waits longest, and those of the others that fill it best.

    Args:
      visits: what it reads, by number.
      submit: (source, number) -> function that waits for the sample; of samples that are not skipped only the size matters here.
      room: of a row.
      look_ahead: samples that wait.
      counts: of what it reads.
      note: (counts, whether it is the record's first visit, what was read) is told of each sample.
    """

    def __init__(
        self,
        visits: Sequence[Visit],
        submit: Callable[[int, int], Callable[[], Sample | Skipped]],
        room: Room,
        look_ahead: int,
        counts: Counts,
        note: Callable[[Counts, bool, Sample | Skipped], None],
    ):
        self._visits, self._submit, self._room, self._look_ahead, self._counts, self._note = (
            visits,
            submit,
            room,
            look_ahead,
            counts,
            note,
        )
        self._go_to(0, [])

    def _go_to(self, following: int, waiting: list[int]) -> None:
        self._next = following  # the first visit that is not read yet
        self._again = collections.deque(
            waiting
        )  # visits that waited when the state was saved, and are not read again yet
        self._upcoming = itertools.chain(waiting, itertools.count(following))
        self._reading = (
            collections.deque()
        )  # (visit, whether its record's first, function that waits for the sample)
        self._waiting: dict[int, Sample] = {}  # visit -> sample, in the order of the visits

    def read_ahead(self) -> None:
        """Begins to read what the next rows are made of."""
        while len(self._waiting) + len(self._reading) < self._look_ahead + READ_AHEAD:
            visit = next(self._upcoming)
            source, number, first = self._visits[visit]
            self._reading.append((visit, first, self._submit(source, number)))

    def __next__(self) -> list[Sample]:
        """The samples of the next row.

        Raises:
          TooManyBadSamples, WorkerDied.
        """
        while len(self._waiting) < self._look_ahead:
            self.read_ahead()
            self._read()
        oldest, *others = self._waiting
        chosen = fullest(
            [self._waiting[visit].size for visit in others],
            self._room.without(self._waiting[oldest].size),
        )
        row = [
            self._waiting.pop(visit) for visit in (oldest, *(others[number] for number in chosen))
        ]
        self.read_ahead()
        return row

    def _read(self) -> None:
        visit, first, wait = self._reading.popleft()
        outcome = wait()
        if self._again:
            self._again.popleft()
            first = False  # it was counted then
        else:
            self._next += 1
        self._note(self._counts, first, outcome)
        if not isinstance(outcome, Skipped):
            self._waiting[visit] = outcome

    def get_state(self) -> dict:
        """What comes next and what has been counted, in JSON."""
        return {
            "next": self._next,
            "waiting": [*self._waiting, *self._again],
            **dataclasses.asdict(self._counts),
        }

    def set_state(self, state: dict) -> None:
        """Goes back to where get_state was asked; what waited then is read again."""
        self._go_to(state["next"], state["waiting"])
        for field in dataclasses.fields(Counts):
            setattr(self._counts, field.name, state[field.name])
