"""A stream takes every sample once, keeps none waiting forever, and resumes at its state."""

import itertools
import json
import time
from typing import NamedTuple

import grain
import numpy as np
import pytest

from mod_jax.data.batches.order import Visit
from mod_jax.data.batches.packing import Room
from mod_jax.data.batches.streams import (
    BAD_IN_A_ROW,
    READ_AHEAD,
    RoundRobin,
    Stream,
    counts_of,
)
from mod_jax.data.samples.sample import Skipped

ROOM = Room(20, 4, 4)
LOOK_AHEAD = 6
RECORDS = 5000
BAD = {3, 4, 17, 90}
SIZES = np.random.default_rng(0).integers((2, 0), (15, 3), (RECORDS, 2))


class Sized(NamedTuple):
    """A sample that consists of its size alone."""

    number: int
    size: tuple[int, int]
    truncated: bool
    unused: tuple[str, ...]


class Read:
    """A random-access source of visits that remembers which records were read.

    Odd numbers are records of a second source.
    """

    def __init__(self, bad=BAD):
        self.bad = bad
        self.numbers = []

    def __len__(self):
        return RECORDS

    def __getitem__(self, number):
        self.numbers.append(number)
        if number in self.bad:
            return Visit(Skipped(number, f"r{number}", "why"), number % 2, number < 100)
        positions, pictures = SIZES[number].tolist()
        unused = ("score",) if number % 7 == 0 else ()
        sample = Sized(number, (positions, pictures), number % 10 == 0, unused)
        return Visit(sample, number % 2, number < 100)


def dataset(read=None, number=0):
    visits = grain.MapDataset.source(read or Read())
    return Stream(number, visits, ROOM, LOOK_AHEAD, 1, Stream.beginning(2))


def stream(read=None):
    return iter(dataset(read))


def rows_of(stream, rows):
    return [[sample.number for sample in next(stream).samples] for _ in range(rows)]


def test_every_good_sample_comes_once():
    rows = rows_of(stream(), 600)
    taken = [number for row in rows for number in row]
    assert len(taken) == len(set(taken))
    assert set(range(max(taken) - 3 * LOOK_AHEAD)) - set(taken) == BAD


def test_rows_keep_their_limits_and_take_the_sample_that_has_waited_longest_first():
    made = stream()
    for _ in range(200):
        before = made.get_state()["waiting"]
        row = [sample.number for sample in next(made).samples]
        assert not before or row[0] == before[0]
        assert len(row) <= ROOM.samples
        assert (SIZES[row].sum(0) <= ROOM[:2]).all()
        waiting = set(made.get_state()["waiting"])
        assert not waiting & set(row)
        assert len(waiting) < LOOK_AHEAD


def test_exactly_the_following_samples_are_read_ahead():
    read = Read()
    made = stream(read)
    assert not read.numbers, "nothing is read before the first row is requested"
    for _ in range(20):
        next(made)
        expected = made.get_state()["next"] + READ_AHEAD
        wait_until(lambda expected=expected: len(read.numbers) >= expected)
        assert len(read.numbers) == expected
    assert read.numbers == list(range(len(read.numbers)))


def wait_until(condition):
    """Waits for the condition, at most 20 s: the thread that reads may lag behind."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize("after", [0, 1, 2, 7, 40])
def test_a_stream_resumes_where_its_state_says(after):
    whole = stream()
    resumed = stream()
    rows_of(whole, after)
    state = json.loads(json.dumps(whole.get_state()))
    ahead = rows_of(whole, 30)
    rows_of(resumed, 3)
    resumed.set_state(state)
    assert resumed.get_state() == state, "also before anything is reread"
    assert rows_of(resumed, 30) == ahead
    assert resumed.get_state() == whole.get_state()


def test_a_row_carries_the_state_that_follows_it():
    made = stream()
    assert all(next(made).state == made.get_state() for _ in range(10))


def test_the_state_of_a_resumed_stream_is_that_from_which_it_resumed():
    """A run may be stopped again before it has made a row."""
    whole = stream()
    second = stream()
    third = stream()
    rows_of(whole, 9)
    second.set_state(whole.get_state())
    second.start_prefetch()
    third.set_state(second.get_state())
    assert rows_of(third, 20) == rows_of(whole, 20)


def test_records_are_counted_at_their_first_visit_and_once_through_resumption():
    read = Read()
    made = stream(read)
    for _ in range(60):
        made.set_state(json.loads(json.dumps(next(made).state)))
    for source, counts in enumerate(counts_of(made.get_state())):
        numbers = set(range(source, 100, 2))
        assert counts.seen == 50
        assert counts.bad == len(BAD & numbers)
        assert counts.truncated == len(numbers & set(range(0, 100, 10)) - BAD)
        assert counts.unused.records == len(numbers & set(range(0, 100, 7)) - BAD)
        assert counts.unused.keys == ["score"]
    assert set(read.numbers) > set(range(101)), "later records were read too"


def test_bad_records_are_reported_with_the_row_that_follows_them():
    made = stream()
    skipped = [(record.number, number) for number in range(60) for record in next(made).skipped]
    assert [record for record, _ in skipped] == sorted(BAD)


def test_waiting_records_that_have_become_bad_since_the_state_was_saved_are_left_out():
    whole = stream()
    resumed = stream(Read(BAD | set(range(20, 60))))
    rows_of(whole, 10)
    state = whole.get_state()
    assert set(state["waiting"]) & set(range(20, 60))
    resumed.set_state(state)
    assert not {number for row in rows_of(resumed, 10) for number in row} & set(range(20, 60))


def test_a_stream_without_a_good_record_reports_that_again_and_again():
    """It returns empty rows with the number of bad records that it has read."""
    made = stream(Read(set(range(RECORDS))))
    for number in range(1, 4):
        row = next(made)
        assert not row.samples
        assert row.bad_run == (number * BAD_IN_A_ROW // 2, number * BAD_IN_A_ROW // 2)
        assert [record.number for record in row.skipped] == list(
            range((number - 1) * BAD_IN_A_ROW, number * BAD_IN_A_ROW)
        )


def test_reports_without_a_row_change_no_row_and_no_turn():
    """A long stretch of bad records ends; what follows is what would follow without reports."""
    bad = set(range(10, 10 + 3 * BAD_IN_A_ROW))
    found = list(itertools.islice(stream(Read(bad)), 60))
    assert [len(row.samples) for row in found].count(0) == 3
    rows = [[sample.number for sample in row.samples] for row in found if row.samples]
    taken = [number for row in rows for number in row]
    assert len(taken) == len(set(taken))
    assert set(range(max(taken) - 3 * LOOK_AHEAD)) - set(taken) == bad
    together = iter(RoundRobin([dataset(Read(bad)), dataset(number=1)], block=2))
    turns = [row.stream for row in itertools.islice(together, 60) if row.samples]
    assert turns == [0, 0, 1, 1] * (len(turns) // 4) + [0, 0, 1, 1][: len(turns) % 4]


def test_streams_take_turns_in_blocks_of_rows():
    together = iter(RoundRobin([dataset(number=number) for number in (4, 7)], block=3))
    alone = {number: iter(dataset(number=number)) for number in (4, 7)}
    for number in itertools.islice(itertools.cycle([4, 4, 4, 7, 7, 7]), 20):
        row = next(together)
        assert row.stream == number
        assert row == next(alone[number])
    state = together.get_state()
    ahead = [next(together) for _ in range(9)]
    together.set_state(state)
    assert [next(together) for _ in range(9)] == ahead
