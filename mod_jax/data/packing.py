"""Packs samples into rows (first fit) and rows into a Batch.

Axes: B rows, S positions, N pictures a row, H W picture height and width, G samples a row.
"""

import grain
import numpy as np

from mod_jax.batch import Batch

PER_POSITION = ("tokens", "targets", "loss_weights", "positions", "branch_ids", "is_picture")


def pack(samples: grain.IterDataset, *, rows: int, length: int, images_per_row: int, samples_per_row: int, padding_id: int) -> grain.IterDataset:
    """Packs a stream of samples into Batches of `rows` rows. State of its iterator: Grain's, exact.

    Args:
      samples: dicts of PER_POSITION arrays [S'], `images` u8[N',H,W,3] and `number` i32[1], each within the limits.
      rows: B. Samples go to the first row with room, until one finds none; then the next batch begins.
      length: S.
      images_per_row: N; 0 for texts.
      samples_per_row: G.
      padding_id: token of empty positions.
    Returns:
      A stream of Batches of numpy arrays.
    """
    lengths = {name: length for name in PER_POSITION} | {"images": images_per_row, "number": samples_per_row}
    padding = {name: 0 for name in lengths} | {"tokens": padding_id, "targets": padding_id, "number": -1}
    packed = grain.experimental.FirstFitPackIterDataset(
        samples, length_struct=lengths, num_packing_bins=rows, shuffle_bins=False, padding_struct=padding)
    return packed.batch(rows, drop_remainder=True, batch_fn=to_batch)


def to_batch(rows: list[dict]) -> Batch:
    """Stacks packed rows. A picture token takes the next feature of its row, pictures being stacked in the order of the samples."""
    columns = {name: np.stack([row[name] for row in rows]) for name in (*PER_POSITION, "images", "number", "tokens_segment_ids")}
    is_picture = columns.pop("is_picture")
    picture_index = np.where(is_picture, np.cumsum(is_picture, axis=1) - 1, -1).astype(np.int32)
    return Batch(picture_index=picture_index, segment_ids=columns.pop("tokens_segment_ids"), samples=columns.pop("number"), **columns)
