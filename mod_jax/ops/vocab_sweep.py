"""What the sweeps over the head share: their inputs, their results, and the positions to visit.

Axes: B rows, S positions, N positions of one device, C positions of a block, D width, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Side(NamedTuple):
    """Hidden states and output head of one model, the student or the teacher."""

    hidden: jax.Array
    head: jax.Array


class Block(NamedTuple):
    """How much of the logits [N,V] a device holds at a time.

    Attributes:
      positions: C.
      words: Of the vocabulary; None takes all words of a position at once.
    """

    positions: int
    words: int | None = None


class Form(NamedTuple):
    """What is computed, and how: `block` and `cross_entropy` as in `weighted_divergence`."""

    block: Block | None
    cross_entropy: bool = False


class Plan(NamedTuple):
    """How one sweep goes over the head.

    Attributes:
      form: What is computed.
      words: Vs, over all devices.
      shared: Words that student and teacher have in common, min(Vs, Vt).
      head_trains: Whether the gradient of the student's head is made.
      split: Whether each device along `tensor` holds a slice of the vocabulary.
    """

    form: Form
    words: int
    shared: int
    head_trains: bool
    split: bool


class Sweep(NamedTuple):
    """What one sweep over the head makes.

    Attributes:
      values: f32[B,S] each, 0 outside the mask: the log-probabilities and, with a teacher, the
        divergences.
      d_hidden: f[B,S,D], gradient of the weighted sum of the values in the student's hidden states;
        None without weights.
      d_head: The same for the student's head, [V,D] in its dtype; None if it is frozen.
    """

    values: tuple[jax.Array, ...]
    d_hidden: jax.Array | None
    d_head: jax.Array | None


def empty_sweep(
    plan: Plan,
    student: Side,
    teacher: Side | None,
    mask_n: jax.Array,
    weights: tuple[jax.Array, ...] | None,
) -> Sweep:
    """What a sweep has made before its first block: zeros for all that it is to make."""
    return Sweep(
        tuple(jnp.zeros(mask_n.shape) for _ in range(1 if teacher is None else 2)),
        None if weights is None else jnp.zeros_like(student.hidden),
        jnp.zeros(student.head.shape, jnp.float32) if plan.head_trains else None,
    )


def chunk_indices(mask_n: jax.Array, positions: int) -> tuple[jax.Array, jax.Array]:
    """Indices of the masked positions, in chunks.

    Returns:
      i32[largest number of chunks, C], filled up with N, which is out of bounds; and i32[], the
      number of chunks that hold any masked position.
    """
    positions = min(positions, mask_n.size)
    size = -(-mask_n.size // positions) * positions
    (indices,) = jnp.nonzero(mask_n, size=size, fill_value=mask_n.size)
    return indices.reshape(-1, positions), -(-jnp.count_nonzero(mask_n) // positions)


def take(x: jax.Array, indices_c: jax.Array) -> jax.Array:
    """x[indices], 0 where an index is out of bounds."""
    return jnp.take(x, indices_c, axis=0, mode="fill", fill_value=0)


def put(x: jax.Array, indices_c: jax.Array, rows: jax.Array) -> jax.Array:
    """`x` with `rows` at the indices, but for those that are out of bounds."""
    return x.at[indices_c].set(rows.astype(x.dtype), mode="drop")


@jax.named_scope("head")
def logits_of(rows_cd: jax.Array, head_vd: jax.Array) -> jax.Array:
    """f32[C,V], the product of the rows with the head."""
    return jnp.einsum("cd,vd->cv", rows_cd, head_vd, preferred_element_type=jnp.float32)
