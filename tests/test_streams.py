"""One stream: every sample once, none waits for ever, and it goes on exactly where its state says."""

import json
from typing import NamedTuple

import numpy as np
import pytest

from mod_jax.data.batches.order import Visit
from mod_jax.data.batches.packing import Room
from mod_jax.data.batches.skips import Counts
from mod_jax.data.batches.streams import READ_AHEAD, Stream
from mod_jax.data.samples.sample import Skipped

ROOM, LOOK_AHEAD, RECORDS = Room(20, 4, 4), 6, 5000
BAD = {3, 4, 17, 90}
SIZES = np.random.default_rng(0).integers((2, 0), (15, 3), (RECORDS, 2))


class Sized(NamedTuple):
    """A sample that is nothing but its size."""

    number: int
    size: tuple[int, int]
    truncated: bool


class Read:
    """Reads records by number, and remembers which."""

    def __init__(self, bad=BAD):
        self.bad, self.numbers = bad, []

    def __call__(self, source, number):
        self.numbers.append(number)
        return lambda: (
            Skipped(number, f"r{number}", "why")
            if number in self.bad
            else Sized(number, tuple(map(int, SIZES[number])), number % 10 == 0)
        )


def count(counts, first, outcome):
    counts.seen += first
    counts.bad += first and isinstance(outcome, Skipped)


def stream(read=None, note=count):
    return Stream(
        [Visit(0, number, number < 100) for number in range(RECORDS)],
        read or Read(),
        ROOM,
        LOOK_AHEAD,
        Counts(),
        note,
    )


def rows_of(stream, rows):
    return [[sample.number for sample in next(stream)] for _ in range(rows)]


def test_every_sample_comes_once_but_the_bad_ones():
    rows = rows_of(stream(), 600)
    taken = [number for row in rows for number in row]
    assert len(taken) == len(set(taken))
    assert set(range(max(taken) - 3 * LOOK_AHEAD)) - set(taken) == BAD


def test_rows_keep_their_limits_and_take_who_waits_longest_first():
    waiting = set()
    made = stream()
    for _ in range(200):
        before = made.get_state()["waiting"]
        row = [sample.number for sample in next(made)]
        assert not before or row[0] == before[0]
        assert len(row) <= ROOM.samples and (SIZES[row].sum(0) <= ROOM[:2]).all()
        waiting = set(made.get_state()["waiting"])
        assert not waiting & set(row) and len(waiting) < LOOK_AHEAD


def test_what_follows_is_read_ahead_and_no_more():
    read = Read()
    made = stream(read)
    assert not read.numbers, "nothing before it is asked for"
    for _ in range(20):
        next(made)
        state = made.get_state()
        assert len(read.numbers) - state["next"] + len(state["waiting"]) == LOOK_AHEAD + READ_AHEAD
    assert read.numbers == list(range(len(read.numbers)))


@pytest.mark.parametrize("after", [0, 1, 2, 7, 40])
def test_it_goes_on_where_its_state_says(after):
    whole, resumed = stream(), stream()
    rows_of(whole, after)
    state = json.loads(json.dumps(whole.get_state()))
    ahead = rows_of(whole, 30)
    rows_of(resumed, 3)
    resumed.set_state(state)
    assert resumed.get_state() == state, "before anything is read again, too"
    assert rows_of(resumed, 30) == ahead
    assert resumed.get_state() == whole.get_state()


def test_a_state_of_a_state():
    """A run that is stopped again before it has made a row."""
    whole, second, third = stream(), stream(), stream()
    rows_of(whole, 9)
    second.set_state(whole.get_state())
    second.read_ahead()
    third.set_state(second.get_state())
    assert rows_of(third, 20) == rows_of(whole, 20)


def test_records_are_counted_at_their_first_visit_and_once_through_resumption():
    noted = []
    made = stream(note=lambda counts, first, outcome: noted.append((outcome.number, first)))
    for _ in range(60):
        next(made)
        made.set_state(made.get_state())
    counted = [number for number, first in noted if first]
    assert counted == list(range(100))
    assert {number for number, _ in noted} > set(range(100)), "later ones were read too"


def test_what_has_gone_bad_since_the_state_was_saved_is_left_out():
    whole, resumed = stream(), stream(Read(BAD | set(range(20, 60))))
    rows_of(whole, 10)
    state = whole.get_state()
    assert set(state["waiting"]) & set(range(20, 60))
    resumed.set_state(state)
    assert not {number for row in rows_of(resumed, 10) for number in row} & set(range(20, 60))
