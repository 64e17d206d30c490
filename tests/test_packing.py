"""Packing, alone: which samples a row takes, where they land, and what empty places hold."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mod_jax.data.batches.packing import PER_POSITION, Room, fullest, to_batch
from mod_jax.data.samples.sample import Sample
from mod_jax.data.samples.tokens import Tokens

END = 99


def sample(number, length, pictures=0):
    """Sample `number`: all its values are its number; its first 2 x pictures positions are picture tokens."""
    fields = {name: np.full(length, number, dtype) for name, dtype in PER_POSITION.items()}
    fields |= {
        "is_picture": np.arange(length) < 2 * pictures,
        "positions": np.arange(length, dtype=np.int32),
    }
    return Sample(
        Tokens(**fields, num_pictures=pictures, truncated=False),
        np.full((pictures, 4, 4, 3), number, np.uint8),
        number,
    )


def brute_force(sizes, room):
    """The most positions that any choice within the room takes."""
    choices = itertools.chain.from_iterable(
        itertools.combinations(sizes, count) for count in range(min(room.samples, len(sizes)) + 1)
    )
    totals = [tuple(map(sum, zip(*choice))) or (0, 0) for choice in choices]
    return max(
        positions
        for positions, pictures in totals
        if positions <= room.positions and pictures <= room.pictures
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=9),
    st.builds(Room, st.integers(0, 60), st.integers(0, 5), st.integers(0, 5)),
)
def test_no_choice_is_fuller(sizes, room):
    chosen = fullest(sizes, room)
    assert chosen == sorted(set(chosen)) and len(chosen) <= room.samples
    assert sum(sizes[i][1] for i in chosen) <= room.pictures
    assert sum(sizes[i][0] for i in chosen) == brute_force(sizes, room)


def test_of_equal_choices_the_one_of_those_who_wait_longer():
    assert fullest([(4, 0), (3, 0), (4, 0), (3, 0)], Room(7, 0, 4)) == [0, 1]
    assert fullest([(5, 0), (5, 0)], Room(5, 0, 1)) == [0]


def test_what_is_left_beside_a_sample():
    assert Room(20, 3, 4).without((12, 1)) == Room(8, 2, 3)


def test_a_batch():
    rows = [[sample(5, 3, 1), sample(6, 4)], [sample(7, 8)]]
    batch = to_batch(rows, Room(8, 2, 3), 4, END)
    assert batch.samples.tolist() == [[5, 6, -1], [7, -1, -1]]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0]
    assert batch.tokens[0].tolist() == [5, 5, 5, 6, 6, 6, 6, END]
    assert batch.targets[0, -1] == END and batch.loss_weights[0].tolist() == [
        5,
        5,
        5,
        6,
        6,
        6,
        6,
        0,
    ]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0] and batch.branch_ids[
        0
    ].tolist() == [5, 5, 5, 6, 6, 6, 6, 0]
    assert batch.picture_index[0].tolist() == [0, 1, -1, -1, -1, -1, -1, -1]
    assert (
        batch.images[0, 0].tolist() == np.full((4, 4, 3), 5).tolist()
        and not batch.images[0, 1].any()
        and not batch.images[1].any()
    )


@pytest.mark.parametrize("seed", range(3))
def test_picture_tokens_point_at_their_own_sample_s_pictures(seed):
    rng = np.random.default_rng(seed)
    rows = [
        [
            sample(int(number), int(rng.integers(4, 9)), int(rng.integers(0, 3)))
            for number in rng.integers(1, 200, 2)
        ]
        for _ in range(20)
    ]
    batch = to_batch(rows, Room(24, 5, 5), 4, END)
    for row in range(20):
        pointing = batch.picture_index[row] >= 0
        assert (
            batch.images[row, batch.picture_index[row, pointing] // 2, 0, 0, 0]
            == batch.tokens[row, pointing]
        ).all()
        assert np.unique(batch.picture_index[row, pointing]).size == pointing.sum(), (
            "no feature twice"
        )
        assert not batch.images[row, pointing.sum() // 2 :].any()
