"""A sweep over the head in chunks of positions, each with the logits of all words.

It makes the gradient of a head that trains, and devices may each hold a slice of the vocabulary:
per chunk they exchange maxima and sums of C positions.

Axes: N positions of one device, C positions of a chunk, D width, W words of the slice that one
device holds.
"""

import functools
from collections.abc import Callable

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
from mod_jax.sharding import AXES


def sweep_chunks(
    positions: int,
    plan: Plan,
    student: Side,
    teacher: Side | None,
    targets_n: jax.Array,
    mask_n: jax.Array,
    weights: tuple[jax.Array, ...] | None,
) -> Sweep:
    """Values and gradients of one device's rows.

    Args:
      positions: C.
      plan: What to make.
      student: f[N,D] and f[W,D].
      teacher: The same of the teacher, or None.
      targets_n, mask_n: i32[N], bool[N].
      weights: f32[N] of each value; None makes values alone.

    Returns:
      Values f32[N], d_hidden f[N,D], and d_head f32[W,D], the sum over these rows. Of a slice of
      the vocabulary d_hidden is f32, to be summed over the slices.
    """
    hidden, head = student
    indices, chunks = chunk_indices(mask_n, positions)
    if plan.slices:
        # Devices that exchange numbers in the loop have to take as many turns.
        chunks = jax.lax.pmax(chunks, AXES)

    def body(i, sweep):
        indices_c = indices[i]
        rows = take(hidden, indices_c)
        teacher_cv = teacher and logits_of(take(teacher.hidden, indices_c), teacher.head)
        found, gradient = _of_logits(
            plan, logits_of(rows, head), teacher_cv, take(targets_n, indices_c)
        )
        values = tuple(put(x, indices_c, new) for x, new in zip(sweep.values, found))
        if weights is None or sweep.d_hidden is None:
            return Sweep(values, None, None)
        d_logits = gradient([take(x, indices_c) for x in weights]).astype(hidden.dtype)
        d_rows = jnp.einsum("cv,vd->cd", d_logits, head, preferred_element_type=jnp.float32)
        d_hidden = put(sweep.d_hidden, indices_c, d_rows)
        if sweep.d_head is None:
            return Sweep(values, d_hidden, None)
        d_head = jnp.einsum("cv,cd->vd", d_logits, rows, preferred_element_type=jnp.float32)
        return Sweep(values, d_hidden, sweep.d_head + d_head)

    start = empty_sweep(plan, student, teacher, mask_n, weights)
    return jax.lax.fori_loop(0, chunks, body, start)


def _of_logits(
    plan: Plan, student_cv: jax.Array, teacher_cv: jax.Array | None, targets_c: jax.Array
) -> tuple[tuple[jax.Array, ...], Callable[[list[jax.Array]], jax.Array]]:
    """The values of a chunk, f32[C] each, and the gradient of their weighted sum.

    The gradient f32[C,W], a function of the weights f32[C] of each value, is written out, so that
    there are neither scatters nor residuals.
    """
    # A CPU writes out whatever is reduced, so sums are taken of logits as they are.
    total = functools.partial(_over_slices, plan, jax.lax.psum)
    width = student_cv.shape[1]
    first = jax.lax.axis_index(plan.slices) * width if plan.slices else 0
    log_sum = _log_sum_exp(plan, student_cv)
    column = jnp.where(targets_c < first, width, targets_c - first)[:, None]
    at_target = jnp.take_along_axis(student_cv, column, axis=1, mode="fill", fill_value=0)
    log_prob = total(at_target[:, 0]) - log_sum

    def d_log_prob(weights):
        is_target = column == jnp.arange(width)
        return weights[0][:, None] * (is_target - jnp.exp(student_cv - log_sum[:, None]))

    if teacher_cv is None:
        return (log_prob,), d_log_prob

    teacher_cv = fitted(teacher_cv, width, axis=1)
    compared_cv, compared_sum = student_cv, log_sum
    if plan.shared < plan.words:
        is_shared = first + jnp.arange(width) < plan.shared
        compared_cv = jnp.where(is_shared, student_cv, -jnp.inf)
        compared_sum = _log_sum_exp(plan, compared_cv)
        teacher_cv = jnp.where(is_shared, teacher_cv, -jnp.inf)
    teacher_sum = _log_sum_exp(plan, teacher_cv)
    teacher_words = jnp.exp(teacher_cv - teacher_sum[:, None])
    gap = -compared_cv if plan.form.cross_entropy else teacher_cv - compared_cv
    if plan.shared < plan.words:
        gap = jnp.where(is_shared, gap, 0)
    gap_of_sums = -compared_sum if plan.form.cross_entropy else teacher_sum - compared_sum
    divergence = total(jnp.sum(teacher_words * gap, axis=-1)) - gap_of_sums

    def d_both(weights):
        student_words = jnp.exp(compared_cv - compared_sum[:, None])
        return d_log_prob(weights) + weights[1][:, None] * (student_words - teacher_words)

    return (log_prob, divergence), d_both


def _log_sum_exp(plan: Plan, logits_cv: jax.Array) -> jax.Array:
    """f32[C], over the words of all slices."""
    largest = _over_slices(plan, jax.lax.pmax, jnp.max(logits_cv, axis=-1))
    scaled = jnp.sum(jnp.exp(logits_cv - largest[:, None]), axis=-1)
    return largest + jnp.log(_over_slices(plan, jax.lax.psum, scaled))


def _over_slices(plan: Plan, reduce: Callable, x: jax.Array) -> jax.Array:
    """`reduce`, psum or pmax, over the devices that hold the other slices of the vocabulary."""
    return reduce(x, plan.slices) if plan.slices else x


def fitted(x: jax.Array, size: int, axis: int) -> jax.Array:
    """The first `size` entries along an axis, with zeros after the last one."""
    x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding)
