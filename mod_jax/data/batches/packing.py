"""Chooses the samples of a row so that it is as full as possible, and makes a Batch of the rows.

Axes: B rows, S positions, N pictures per row, H and W picture height and width, G samples per row.

Grain's own packers are not used, because they close all open rows as soon as a sample fits none of
them. With rows of 2048 positions, and 576 positions per picture, they leave 14 % of the positions
empty with 32 open rows and 21 % with one, whereas choosing among the next 32 samples leaves 9 %
(benchmarks/padding.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from mod_jax.batch import Batch
from mod_jax.config import DataConfig, ModelConfig
from mod_jax.data.samples.sample import Sample

PER_POSITION = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_weights": np.float32,
    "positions": np.int32,
    "branch_ids": np.int32,
    "is_picture": bool,
}


class Room(NamedTuple):
    """What a row, or the rest of one, can hold.

    Attributes:
      positions: Number of positions (S).
      pictures: Number of pictures (N).
      samples: Number of samples (G).
    """

    positions: int
    pictures: int
    samples: int

    @classmethod
    def of_row(cls, config: DataConfig) -> "Room":
        """Returns what an empty row holds."""
        return cls(config.sequence_length, config.images_per_row, config.samples_per_row)

    def without(self, size: tuple[int, int]) -> "Room":
        """Returns what is left beside a sample of this size (positions, pictures)."""
        positions, pictures = size
        return Room(self.positions - positions, self.pictures - pictures, self.samples - 1)


def fullest(sizes: Sequence[tuple[int, int]], room: Room) -> list[int]:
    """Chooses the samples that together fill the most positions of a room.

    It solves the knapsack problem exactly, by dynamic programming over the samples.

    Args:
      sizes: (positions, pictures) of each sample.
      room: What can be filled.
    Returns:
      The indices of the chosen samples, ascending. Of equally full choices it is the one that takes
      earlier samples.
    """
    within = (1 << room.positions + 1) - 1
    # reachable[i] describes all choices among the first i samples. It maps (samples, pictures) of a
    # choice to a bit set of the possible numbers of positions: bit n is set if n can be reached.
    reachable: list[dict[tuple[int, int], int]] = [{(0, 0): 1}]
    for positions, pictures in sizes:
        before = reachable[-1]
        after = dict(before)
        for (samples, shown), totals in before.items():
            grown = totals << positions & within
            if grown and samples < room.samples and shown + pictures <= room.pictures:
                key = samples + 1, shown + pictures
                after[key] = after.get(key, 0) | grown
        reachable.append(after)
    final = reachable[-1]
    samples, shown = max(final, key=lambda key: final[key].bit_length())
    total = final[samples, shown].bit_length() - 1
    # Walk back through the samples, and take one only if the total is not reachable without it.
    chosen = []
    for index in reversed(range(len(sizes))):
        reachable_without = reachable[index].get((samples, shown), 0) >> total & 1
        if not reachable_without:
            positions, pictures = sizes[index]
            chosen.append(index)
            total -= positions
            samples -= 1
            shown -= pictures
    return chosen[::-1]


def to_batch(
    rows: Sequence[Sequence[Sample]], room: Room, image_size: int, padding_id: int
) -> Batch:
    """Lays the samples of each row side by side.

    The picture tokens of a row take the features of its pictures in order, because its pictures are
    in the order of its samples.

    Args:
      rows: The samples of each row, which have to fit.
      room: What a row can hold.
      image_size: Height and width of a picture, px.
      padding_id: Token and target of empty positions.
    Returns:
      A Batch of numpy arrays.
    """
    fields = {
        name: np.zeros((len(rows), room.positions), dtype) for name, dtype in PER_POSITION.items()
    }
    fields["tokens"][:] = padding_id
    fields["targets"][:] = padding_id
    segment_ids = np.zeros((len(rows), room.positions), np.int32)
    images = np.zeros((len(rows), room.pictures, image_size, image_size, 3), np.uint8)
    numbers = np.full((len(rows), room.samples), -1, np.int32)
    for row, samples in enumerate(rows):
        start = 0
        first_picture = 0
        for index, sample in enumerate(samples):
            positions, pictures = sample.size
            end = start + positions
            for name, values in fields.items():
                values[row, start:end] = getattr(sample.tokens, name)
            segment_ids[row, start:end] = index + 1
            images[row, first_picture : first_picture + pictures] = sample.images
            numbers[row, index] = sample.number
            start = end
            first_picture += pictures
    is_picture = fields.pop("is_picture")
    picture_index = np.where(is_picture, np.cumsum(is_picture, axis=1) - 1, -1).astype(np.int32)
    return Batch(
        **fields,
        segment_ids=segment_ids,
        picture_index=picture_index,
        images=images,
        samples=numbers,
    )


def batch_shapes(config: DataConfig, rows: int, model: ModelConfig) -> Batch:
    """Returns the shapes of a batch of `rows` rows for a model, as a Batch of ShapeDtypeStructs.

    They are the same for chats and pairs, whatever the records hold.
    """
    row = to_batch([()], Room.of_row(config), model.vision.image_size, model.end_token_id)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), row)
