"""Packing by itself: which samples a row takes, where they land, and what empty places hold."""

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
    """Makes a sample all of whose values are its number.

    Its first 2 * pictures positions are picture tokens.
    """
    fields = {name: np.full(length, number, dtype) for name, dtype in PER_POSITION.items()}
    fields["is_picture"] = np.arange(length) < 2 * pictures
    fields["positions"] = np.arange(length, dtype=np.int32)
    tokens = Tokens(**fields, num_pictures=pictures, truncated=False)
    images = np.full((pictures, 4, 4, 3), number, np.uint8)
    return Sample(tokens, images, number)


def brute_force(sizes, room):
    """Returns the most positions that any choice within the room takes."""
    most = 0
    for count in range(min(room.samples, len(sizes)) + 1):
        for choice in itertools.combinations(sizes, count):
            positions = sum(positions for positions, _ in choice)
            pictures = sum(pictures for _, pictures in choice)
            if positions <= room.positions and pictures <= room.pictures:
                most = max(most, positions)
    return most


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=9),
    st.builds(Room, st.integers(0, 60), st.integers(0, 5), st.integers(0, 5)),
)
def test_no_choice_is_fuller(sizes, room):
    chosen = fullest(sizes, room)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= room.samples
    assert sum(sizes[i][1] for i in chosen) <= room.pictures
    assert sum(sizes[i][0] for i in chosen) == brute_force(sizes, room)


def test_of_equal_choices_the_one_with_earlier_samples_is_taken():
    assert fullest([(4, 0), (3, 0), (4, 0), (3, 0)], Room(7, 0, 4)) == [0, 1]
    assert fullest([(5, 0), (5, 0)], Room(5, 0, 1)) == [0]


def test_what_is_left_beside_a_sample():
    assert Room(20, 3, 4).without((12, 1)) == Room(8, 2, 3)


def test_to_batch_lays_samples_side_by_side():
    rows = [[sample(5, 3, 1), sample(6, 4)], [sample(7, 8)]]
    batch = to_batch(rows, Room(8, 2, 3), 4, END)
    assert batch.samples.tolist() == [[5, 6, -1], [7, -1, -1]]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0]
    assert batch.tokens[0].tolist() == [5, 5, 5, 6, 6, 6, 6, END]
    assert batch.targets[0, -1] == END
    assert batch.loss_weights[0].tolist() == [5, 5, 5, 6, 6, 6, 6, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert batch.branch_ids[0].tolist() == [5, 5, 5, 6, 6, 6, 6, 0]
    assert batch.picture_index[0].tolist() == [0, 1, -1, -1, -1, -1, -1, -1]
    assert (batch.images[0, 0] == 5).all()
    assert not batch.images[0, 1].any()
    assert not batch.images[1].any()


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
    for index, tokens, images in zip(batch.picture_index, batch.tokens, batch.images):
        is_picture = index >= 0
        features = index[is_picture]
        assert (images[features // 2, 0, 0, 0] == tokens[is_picture]).all()
        assert np.unique(features).size == features.size, "no feature is used twice"
        assert not images[features.size // 2 :].any()
