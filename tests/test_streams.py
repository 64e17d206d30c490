"""One stream: every sample once, none waits for ever, and it goes on exactly where its state says."""

import itertools
import json
import sys
import time
from typing import NamedTuple

import grain
import numpy as np
import pytest

from mod_jax.data.batches.order import Visit
from mod_jax.data.batches.packing import Room
from mod_jax.data.batches.streams import READ_AHEAD, RoundRobin, Stream, counts_of
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
    """A random-access source of visits that remembers which records were read."""

    def __init__(self, bad=BAD):
        self.bad, self.numbers = bad, []

    def __len__(self):
        return RECORDS

    def __getitem__(self, number):
        self.numbers.append(number)
        if number in self.bad:
            return Visit(Skipped(number, f"r{number}", "why"), number < 100)
        sample = Sized(number, tuple(map(int, SIZES[number])), number % 10 == 0)
        return Visit(sample, number < 100)


def dataset(read=None, number=0, give_up_after=sys.maxsize):
    visits = grain.MapDataset.source(read or Read())
    return Stream(number, visits, ROOM, LOOK_AHEAD, 1, give_up_after, Stream.beginning())


def stream(read=None):
    return iter(dataset(read))


def rows_of(stream, rows):
    return [[sample.number for sample in next(stream).samples] for _ in range(rows)]


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
        row = [sample.number for sample in next(made).samples]
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
        following = made.get_state()["next"]
        wait_until(lambda: len(read.numbers) >= following + READ_AHEAD)
        assert len(read.numbers) == following + READ_AHEAD
    assert read.numbers == list(range(len(read.numbers)))


def wait_until(condition):
    """Reading happens in a thread of its own, so that it may lag behind."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


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


def test_a_row_carries_the_state_that_follows_it():
    made = stream()
    assert all(next(made).state == made.get_state() for _ in range(10))


def test_a_state_of_a_state():
    """A run that is stopped again before it has made a row."""
    whole, second, third = stream(), stream(), stream()
    rows_of(whole, 9)
    second.set_state(whole.get_state())
    second.start_prefetch()
    third.set_state(second.get_state())
    assert rows_of(third, 20) == rows_of(whole, 20)


def test_records_are_counted_at_their_first_visit_and_once_through_resumption():
    read = Read()
    made = stream(read)
    for _ in range(60):
        made.set_state(next(made).state)
    assert counts_of(made.get_state()).seen == 100 and counts_of(made.get_state()).bad == len(BAD)
    assert counts_of(made.get_state()).truncated == len(set(range(0, 100, 10)) - BAD)
    assert set(read.numbers) > set(range(101)), "later ones were read too"


def test_bad_records_come_with_the_row_that_they_precede():
    made = stream()
    skipped = [(record.number, number) for number in range(60) for record in next(made).skipped]
    assert [record for record, _ in skipped] == sorted(BAD)


def test_what_has_gone_bad_since_the_state_was_saved_is_left_out():
    whole, resumed = stream(), stream(Read(BAD | set(range(20, 60))))
    rows_of(whole, 10)
    state = whole.get_state()
    assert set(state["waiting"]) & set(range(20, 60))
    resumed.set_state(state)
    assert not {number for row in rows_of(resumed, 10) for number in row} & set(range(20, 60))


def test_a_stream_without_a_good_record_gives_up():
    """It returns an empty row, and says how many bad records it has met."""
    row = next(iter(dataset(Read(set(range(RECORDS))), give_up_after=70)))
    assert not row.samples and row.bad_run == 70
    assert [record.number for record in row.skipped] == list(range(70))


def test_streams_take_turns_in_blocks_of_rows():
    together = iter(RoundRobin([dataset(number=number) for number in (4, 7)], block=3))
    alone = {number: iter(dataset(number=number)) for number in (4, 7)}
    for number in itertools.islice(itertools.cycle([4, 4, 4, 7, 7, 7]), 20):
        row, expected = next(together), next(alone[number])
        assert row.stream == number and row == expected
    state, ahead = together.get_state(), [next(together) for _ in range(9)]
    together.set_state(state)
    assert [next(together) for _ in range(9)] == ahead
