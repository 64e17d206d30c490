"""The one batch of every stage: packed rows of chats and preference pairs, with their pictures.

Axes: B rows, S positions, N pictures a row, H W picture height and width, G samples a row.
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows. Position i sees position j iff j <= i, both lie in the same segment, and j's branch is 0 or i's own.

    Attributes:
      tokens: i32[B,S], the inputs; a picture occupies as many picture tokens as its tower gives features.
      targets: i32[B,S], the next token of each position, already shifted (method: one shift, made once, in the data).
      loss_weights: f32[B,S], 1 where the target is part of an answer (or its end token), else 0.
      positions: i32[B,S], rotary positions; a segment starts at 0, both branches of a pair continue their shared prefix.
      segment_ids: i32[B,S], 1..G numbers the samples of a row, 0 is padding.
      branch_ids: i32[B,S], 0 shared prefix (and everything of a plain chat), 1 chosen, 2 rejected.
      picture_index: i32[B,S], row of the features [N * features a picture] that a picture token takes, -1 for text.
      images: u8[B,N,H,W,3], RGB; unused places are zeros and no token points at them.
      samples: i32[B,G], number of the source record of each segment, -1 where there is none.
    """

    tokens: jax.Array
    targets: jax.Array
    loss_weights: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    branch_ids: jax.Array
    picture_index: jax.Array
    images: jax.Array
    samples: jax.Array
