"""The batch that every stage trains on: packed rows of chats or preference pairs, with pictures.

Axes: B rows, S positions, N pictures per row, H and W picture height and width, G samples per row.
"""

import dataclasses

import jax
import numpy as np

# Batches are numpy arrays while the host packs them, and jax arrays once they are on the devices.
Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows of samples.

    Position i attends to position j if and only if j <= i, both lie in the same segment, and the
    branch of j is 0 or the branch of i.

    Attributes:
      tokens: i32[B,S], the input tokens. A picture takes as many picture tokens as the vision tower
        gives features for it.
      targets: i32[B,S], the next token of each position. The shift is done once, when samples are
        tokenized; the losses do not shift again.
      loss_weights: f32[B,S], 1 where the target belongs to an answer (its end token included),
        else 0.
      positions: i32[B,S], rotary positions. Each segment starts at 0; both branches of a pair
        continue from their shared prefix.
      segment_ids: i32[B,S], 1..G numbers the samples of a row; 0 is padding.
      branch_ids: i32[B,S], 0 for the shared prefix of a pair and for all of a plain chat, 1 for the
        chosen answer, 2 for the rejected one.
      picture_index: i32[B,S], for a picture token its row among the N * features feature vectors of
        the batch row; -1 for text.
      images: u8[B,N,H,W,3], RGB. Unused slots are zeros, and no token points at them.
      samples: i32[B,G], number of the source record of each segment; -1 where there is none.
    """

    tokens: Array
    targets: Array
    loss_weights: Array
    positions: Array
    segment_ids: Array
    branch_ids: Array
    picture_index: Array
    images: Array
    samples: Array
