"""A sweep over the head in tiles: some positions times some words, which the caches of a CPU hold.

The logits of a tile are used at once: for the running maximum and sum of an online softmax, and for
the gradient in the hidden states. That of a log-probability is the head's row of the target minus
the mean of all rows by the softmax, so it is a running sum as well, as the values are in
FlashAttention (arXiv 2205.14135) with the head for keys and values. No array has C times V numbers,
and nothing is made twice. The price is one product more where a teacher is compared: the mean of
the student's rows by the teacher's softmax, which a sweep with all words at hand takes together
with that by the student's.

The gradient of the head needs the whole sum first, so a head that trains takes `vocab_chunks`.

Axes: N positions of one device, C positions and W words of a tile, D width, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from mod_jax.ops.vocab_sweep import (
    Plan,
    Side,
    Sweep,
    chunk_indices,
    empty_sweep,
    logits_of,
    put,
    take,
)

LOWEST = float(jnp.finfo(jnp.float32).min)
Carry = TypeVar("Carry")


class Softmax(NamedTuple):
    """The softmax of C positions over the words so far, and sums over these words.

    Attributes:
      highest: f32[C], the largest logit.
      total: f32[C], the sum of exp(logit - highest).
      sums: f32[C,...] each, of something that belongs to a word, times its exp(logit - highest).
    """

    highest: jax.Array
    total: jax.Array
    sums: tuple[jax.Array, ...]

    @property
    def log_sum(self) -> jax.Array:
        """f32[C], the log of the sum of exp(logit)."""
        return self.highest + jnp.log(self.total)

    @property
    def means(self) -> list[jax.Array]:
        """The sums divided by the total: means by the softmax."""
        return [_times(x, 1 / self.total) for x in self.sums]


def sweep_tiles(
    positions: int,
    words: int,
    plan: Plan,
    student: Side,
    teacher: Side | None,
    targets_n: jax.Array,
    mask_n: jax.Array,
    weights: tuple[jax.Array, ...] | None,
) -> Sweep:
    """As `vocab_chunks.sweep_chunks`, for a frozen head of which the device holds all words.

    `positions` and `words` are the size of a tile.
    """
    indices, chunks = chunk_indices(mask_n, positions)

    def body(i, sweep):
        indices_c = indices[i]
        rows_c = take(student.hidden, indices_c)
        targets_c = take(targets_n, indices_c)
        given = () if weights is None else tuple(take(x, indices_c) for x in weights)
        here = student._replace(hidden=rows_c)
        if teacher is None:
            found, d_rows = _log_probs(words, plan, here, targets_c, given)
        else:
            reference = teacher._replace(hidden=take(teacher.hidden, indices_c))
            found, d_rows = _both(words, plan, here, reference, targets_c, given)
        values = tuple(put(x, indices_c, new) for x, new in zip(sweep.values, found))
        d_hidden = put(sweep.d_hidden, indices_c, d_rows) if given else None
        return Sweep(values, d_hidden, None)

    start = empty_sweep(plan, student, teacher, mask_n, weights)
    return jax.lax.fori_loop(0, chunks, body, start)


def _log_probs(
    width: int, plan: Plan, student: Side, targets_c: jax.Array, weights: tuple[jax.Array, ...]
):
    """((log-probabilities f32[C],), their weighted gradient f32[C,D] or, without weights, None)."""
    empty = _empty(student, rows=bool(weights))
    words = _over_tiles(width, 0, plan.words, functools.partial(_add_student, student), empty)
    at_target = take(student.head, targets_c).astype(jnp.float32)
    log_prob = jnp.sum(student.hidden * at_target, axis=-1) - words.log_sum
    if not weights:
        return (log_prob,), None
    (mean_row,) = words.means
    return (log_prob,), _times(at_target - mean_row, weights[0])


def _both(
    width: int,
    plan: Plan,
    student: Side,
    teacher: Side,
    targets_c: jax.Array,
    weights: tuple[jax.Array, ...],
):
    """The same with the divergences, both f32[C], and the gradient of both."""

    def add(softmaxes, begin, size):
        words, reference = softmaxes
        head = _tile(student, begin, size)
        logits = logits_of(student.hidden, head)
        teacher_logits = logits_of(teacher.hidden, _tile(teacher, begin, size))
        gap = -logits if plan.form.cross_entropy else teacher_logits - logits
        rows = [functools.partial(_rows, head)] if weights else []
        gaps = [lambda exps: jnp.sum(exps * gap, axis=-1)]
        return _added(words, logits, rows), _added(reference, teacher_logits, [*gaps, *rows])

    empty = _empty(student, rows=bool(weights))
    reference = empty._replace(sums=(jnp.zeros(targets_c.shape), *empty.sums))
    shared, reference = _over_tiles(width, 0, plan.shared, add, (empty, reference))
    add_student = functools.partial(_add_student, student)
    words = _over_tiles(width, plan.shared, plan.words, add_student, shared)
    at_target = take(student.head, targets_c).astype(jnp.float32)
    log_prob = jnp.sum(student.hidden * at_target, axis=-1) - words.log_sum
    gap, *teacher_row = reference.means
    divergence = gap + shared.log_sum - (0 if plan.form.cross_entropy else reference.log_sum)
    if not weights:
        return (log_prob, divergence), None
    d_log_prob = at_target - words.means[0]
    d_divergence = shared.means[0] - teacher_row[0]
    return (log_prob, divergence), _times(d_log_prob, weights[0]) + _times(d_divergence, weights[1])


def _empty(student: Side, rows: bool) -> Softmax:
    """A softmax over no words yet, with a sum of the student's head rows if asked."""
    positions = student.hidden.shape[:1]
    sums = (jnp.zeros(student.hidden.shape, jnp.float32),) if rows else ()
    return Softmax(jnp.full(positions, LOWEST), jnp.zeros(positions), sums)


def _add_student(student: Side, words: Softmax, begin: jax.Array, size: int) -> Softmax:
    head = _tile(student, begin, size)
    rows = [functools.partial(_rows, head)] if words.sums else []
    return _added(words, logits_of(student.hidden, head), rows)


def _rows(head_wd: jax.Array, exps_cw: jax.Array) -> jax.Array:
    """f32[C,D], the sum of a tile's head rows."""
    return jnp.einsum("cw,wd->cd", exps_cw, head_wd, preferred_element_type=jnp.float32)


def _added(
    softmax: Softmax,
    logits_cw: jax.Array,
    sums_of: Sequence[Callable[[jax.Array], jax.Array]],
) -> Softmax:
    """The softmax after the words of a tile.

    Args:
      softmax: Of the words so far.
      logits_cw: Of the words of the tile.
      sums_of: For each of the sums, what the tile adds to it: exp(logit - highest) f32[C,W] ->
        f32[C,...].
    """
    highest = jnp.maximum(softmax.highest, logits_cw.max(-1))
    kept = jnp.exp(softmax.highest - highest)
    exps = jnp.exp(logits_cw - highest[:, None])
    sums = tuple(_times(x, kept) + of(exps) for x, of in zip(softmax.sums, sums_of, strict=True))
    return Softmax(highest, softmax.total * kept + exps.sum(-1), sums)


def _times(x: jax.Array, factors_c: jax.Array) -> jax.Array:
    return x * factors_c.reshape(-1, *[1] * (x.ndim - 1))


def _tile(side: Side, begin: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(side.head, begin, size)


def _over_tiles(
    width: int, first: int, last: int, body: Callable[..., Carry], carry: Carry
) -> Carry:
    """Folds body(carry, begin, size) over tiles of `width` words that cover [first, last)."""
    whole = (last - first) // width
    if whole:  # the loop traces its body even if it never runs
        carry = jax.lax.fori_loop(0, whole, lambda i, c: body(c, first + i * width, width), carry)
    begin = first + whole * width
    return body(carry, begin, last - begin) if begin < last else carry
