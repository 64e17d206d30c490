"""Packing of samples into rows, alone: where samples land, what empty places hold, and resumption in mid-pack."""

import grain
import numpy as np
import pytest

from mod_jax.data.packing import PER_POSITION, pack

DTYPES = {"loss_weights": np.float32, "is_picture": bool}
END = 99


def sample(number, length, pictures=0):
    """Sample `number`: all its values are its number; its first 2 x pictures positions are picture tokens."""
    arrays = {name: np.full(length, number, DTYPES.get(name, np.int32)) for name in PER_POSITION}
    arrays |= {"is_picture": np.arange(length) < 2 * pictures, "positions": np.arange(length, dtype=np.int32)}
    return arrays | {"images": np.full((pictures, 4, 4, 3), number, np.uint8), "number": np.array([number], np.int32)}


def stream(samples, *, rows=2, length=8, images_per_row=2, samples_per_row=3):
    source = grain.MapDataset.source(samples).to_iter_dataset()
    return pack(source, rows=rows, length=length, images_per_row=images_per_row, samples_per_row=samples_per_row, padding_id=END)


def random_samples(count, seed=0):
    rng = np.random.default_rng(seed)
    return [sample(i, int(rng.integers(4, 9)), int(rng.integers(0, 3))) for i in range(count)]


def first_fit(samples, rows, length, images_per_row, samples_per_row):
    """The rows' sample numbers, batch by batch, by the definition."""
    made, bins = [], [[] for _ in range(rows)]
    for item in samples:
        def fits(row, item=item):
            held = [*row, item]
            return (sum(len(s["tokens"]) for s in held) <= length and sum(len(s["images"]) for s in held) <= images_per_row
                    and len(held) <= samples_per_row)
        row = next((row for row in bins if fits(row)), None)
        if row is None:
            made.append(bins)
            bins = [[] for _ in range(rows)]
            row = bins[0]
        row.append(item)
    return [[[int(s["number"][0]) for s in row] for row in batch] for batch in made]


@pytest.mark.parametrize("limits", [(2, 8, 2, 3), (3, 20, 3, 9), (1, 30, 9, 2), (4, 24, 2, 9)])
def test_first_fit_within_every_limit(limits):
    rows, length, images_per_row, samples_per_row = limits
    samples = random_samples(60)
    made = list(stream(samples, rows=rows, length=length, images_per_row=images_per_row, samples_per_row=samples_per_row))
    numbers = [[[n for n in row if n >= 0] for row in batch.samples.tolist()] for batch in made]
    expected = first_fit(samples, *limits)
    assert len(expected) > 3 and numbers[: len(expected)] == expected


def test_a_row():
    batch = next(iter(stream([sample(5, 3, 1), sample(6, 4), sample(7, 8), sample(8, 8)])))
    assert batch.samples.tolist() == [[5, 6, -1], [7, -1, -1]]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0]
    assert batch.tokens[0].tolist() == [5, 5, 5, 6, 6, 6, 6, END]
    assert batch.targets[0, -1] == END and batch.loss_weights[0, -1] == 0
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert batch.picture_index[0].tolist() == [0, 1, -1, -1, -1, -1, -1, -1]
    assert batch.images[0, 0].tolist() == np.full((4, 4, 3), 5).tolist() and not batch.images[0, 1].any()


def test_picture_tokens_point_at_their_own_sample_s_pictures():
    for batch in stream(random_samples(80), rows=2, length=24, images_per_row=5, samples_per_row=5):
        for row in range(2):
            pointing = batch.picture_index[row] >= 0
            assert (batch.images[row, batch.picture_index[row, pointing] // 2, 0, 0, 0] == batch.tokens[row, pointing]).all()
            assert np.unique(batch.picture_index[row, pointing]).size == pointing.sum(), "no feature twice"
            used = pointing.sum() // 2
            assert not batch.images[row, used:].any()


@pytest.mark.parametrize("after", range(4))
def test_resumption_in_mid_pack(after):
    dataset = stream(random_samples(60), rows=2, length=20, images_per_row=4, samples_per_row=4)
    iterator = iter(dataset)
    for _ in range(after):
        next(iterator)
    state, ahead = iterator.get_state(), [next(iterator).samples.tolist() for _ in range(3)]
    resumed = iter(dataset)
    resumed.set_state(state)
    assert [next(resumed).samples.tolist() for _ in range(3)] == ahead
