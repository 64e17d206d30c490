"""Losses over the vocabulary that never hold the logits [B,S,V] of a whole batch.

Axes: B rows, S positions, N = B * S positions of one device, C positions of a chunk, D width,
V vocabulary, W words of the slice that one device holds.

Each device collects the masked positions of its own rows and walks over them in chunks of C. For a
chunk it multiplies hidden states with the head, reduces the logits to a few numbers per position,
and discards them. So no array with a vocabulary axis outlives its chunk (only the head and its
gradient have one), and positions outside the mask cost nothing. Logits and the sums of the head's
gradient are float32; the inputs of matmuls have the dtype of the hidden states.

**One sweep over the head makes values and gradients.** While a chunk's logits are there, the sweep
also makes the gradient of their weighted sum, and the backward pass only scales it. That needs the
weights of the positions beforehand:

- `weighted_log_probs` and `weighted_divergence` get them, so only one scale is left unknown.
- Of `token_log_probs` every position has a scale of its own, which only the backward pass knows. If
  the head is frozen, scaling the gradient rows [N,D] is exact. If it trains, its gradient sums over
  positions, and the backward pass is a second sweep. So it is for `token_divergence`, where every
  position has two scales.

Without differentiation a sweep makes values alone, and nothing is made for a frozen head.

Under the ambient mesh (`jax.set_mesh`) rows stay on their devices. The devices along `tensor`,
which hold the same rows, keep their slices of the vocabulary: per chunk they exchange maxima and
sums of C positions, and add up the gradient rows [C,D]. Along the axes that split a head's width,
each device gathers its slice [W,D] once, in the dtype of the hidden states; the head's gradient is
summed and scattered back once, in float32. The alternative, to exchange partial logits, moves W
float32 numbers for every counted position of all those devices, and together these outnumber D.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from mod_jax.batch import Array
from mod_jax.sharding import ROWS, RULES

# Mesh axes over which the two dimensions of a head are split.
VOCAB = RULES["vocab"]
EMBED = RULES["embed"]
# Axes along which devices have the same slice of a head, beside EMBED.
REPLICAS = ("data",)
# Positions per device and chunk. An accelerator needs enough to pay for reading the head once per
# chunk: C operations per number read. A CPU needs few enough for the logits to stay small.
CHUNK = 512
CPU_CHUNK = 64
CPU_LOGITS = 2**23  # a smaller vocabulary takes chunks of more positions, up to this many logits


class Side(NamedTuple):
    """Hidden states and output head of one model, the student or the teacher."""

    hidden: jax.Array
    head: jax.Array


class Form(NamedTuple):
    """What is computed, and how: `cross_entropy` and `chunk` as in `token_divergence`."""

    chunk: int | None
    cross_entropy: bool = False


class Plan(NamedTuple):
    """How one sweep goes over the head.

    Attributes:
      form: What is computed.
      words: Vs, over all devices.
      shared: Words that student and teacher have in common, min(Vs, Vt).
      head_trains: Whether the gradient of the student's head is made.
      on_mesh: Whether there are several devices.
      split: Whether each of them holds a slice of the vocabulary.
    """

    form: Form
    words: int
    shared: int
    head_trains: bool
    on_mesh: bool
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


def token_log_probs(
    hidden: jax.Array,
    head_w_vd: jax.Array,
    targets: Array,
    mask: Array,
    *,
    chunk: int | None = None,
) -> jax.Array:
    """Log-probability of each target.

    Example: two words with the logits (0, ln 3) have the probabilities (0.25, 0.75), so a position
    whose target is word 1 gets ln 0.75 = -0.2877.

    Args:
      hidden: f[B,S,D]. Under an ambient mesh, B is a multiple of the devices that rows are split
        over.
      head_w_vd: f32[V,D], cast to the dtype of `hidden` for the matmul.
      targets: i32[B,S], below V where `mask` is True.
      mask: bool[B,S], the positions to compute.
      chunk: Positions that a device computes at a time; None chooses by platform.

    Returns:
      f32[B,S], 0 outside the mask. Differentiable with respect to `hidden` and `head_w_vd`.
    """
    (log_probs,) = _per_position(Form(chunk), Side(hidden, head_w_vd), None, targets, mask)
    return log_probs


def token_divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: Array,
    mask: Array,
    *,
    cross_entropy: bool = False,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and the forward KL(teacher || student) over the vocabulary.

    Both come from one computation of the student's logits. The KL compares the first min(Vs, Vt)
    words, with each side renormalised over them; the log-probability is over the student's full
    vocabulary.

    Example: at a position where the student's logits for two words are (0, ln 3), its probabilities
    are (0.25, 0.75); with the logits (0, 0) the teacher's are (0.5, 0.5). If the target is word 0,
    its log-probability is ln 0.25 = -1.3863. The KL is 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75) =
    0.3466 - 0.2027 = 0.1438. The cross-entropy is -0.5 ln 0.25 - 0.5 ln 0.75 = 0.8370: the KL plus
    the teacher's entropy ln 2 = 0.6931.

    Args:
      student_hidden, student_head: f[B,S,Ds], f32[Vs,Ds].
      teacher_hidden, teacher_head: f[B,S,Dt], f32[Vt,Dt]; they get no gradient.
      targets, mask, chunk: As in `token_log_probs`.
      cross_entropy: Return the cross-entropy -sum p_t log p_s instead of the KL. The reference code
        reports that value; the gradient is the same.

    Returns:
      (log-probabilities f32[B,S], divergences f32[B,S]), 0 outside the mask. Differentiable with
      respect to the student's hidden states and head.
    """
    student = Side(student_hidden, student_head)
    teacher = Side(teacher_hidden, teacher_head)
    form = Form(chunk, cross_entropy)
    log_probs, divergence = _per_position(form, student, teacher, targets, mask)
    return log_probs, divergence


def weighted_log_probs(
    hidden: jax.Array,
    head_w_vd: jax.Array,
    targets: Array,
    mask: Array,
    weights: jax.Array,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of `token_log_probs`, whose gradient costs no second sweep over the head.

    Args:
      hidden, head_w_vd, targets, mask, chunk: As in `token_log_probs`.
      weights: f32[B,S], without a gradient.

    Returns:
      (sum of weight times log-probability over the mask f32[], log-probabilities f32[B,S]). The sum
      is differentiable with respect to `hidden` and `head_w_vd`, the log-probabilities have no
      gradient.
    """
    student = Side(hidden, head_w_vd)
    total, (log_probs,) = _weighted(Form(chunk), student, None, targets, mask, (weights,))
    return total, jax.lax.stop_gradient(log_probs)


def weighted_divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: Array,
    mask: Array,
    log_prob_weights: jax.Array,
    divergence_weights: jax.Array,
    *,
    cross_entropy: bool = False,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sum of `token_divergence`, whose gradient costs no second sweep over the heads.

    Args:
      student_hidden, student_head, teacher_hidden, teacher_head, targets, mask, cross_entropy,
        chunk: As in `token_divergence`.
      log_prob_weights, divergence_weights: f32[B,S], without a gradient.

    Returns:
      (sum over the mask of both values times their weights f32[], log-probabilities f32[B,S],
      divergences f32[B,S]). The sum is differentiable with respect to the student's hidden states
      and head, the other two have no gradient.
    """
    student = Side(student_hidden, student_head)
    teacher = Side(teacher_hidden, teacher_head)
    weights = (log_prob_weights, divergence_weights)
    form = Form(chunk, cross_entropy)
    total, values = _weighted(form, student, teacher, targets, mask, weights)
    log_probs, divergence = jax.lax.stop_gradient(values)
    return total, log_probs, divergence


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_position(
    form: Form, student: Side, teacher: Side | None, targets: Array, mask: Array
) -> tuple[jax.Array, ...]:
    return _sweep(form, student, teacher, targets, mask).values


def _per_position_forward(form: Form, *arguments):
    head_trains = arguments[0].head.perturbed
    student, teacher, targets, mask = jax.tree.map(lambda x: x.value, arguments)
    if head_trains or teacher is not None:
        values = _sweep(form, student, teacher, targets, mask).values
        return values, (None, (student, teacher, targets, mask))
    ones = (jnp.ones(mask.shape),)
    sweep = _sweep(form, student, None, targets, mask, ones)
    return sweep.values, (sweep.d_hidden, None)


def _per_position_backward(form: Form, residuals: tuple, cotangents: tuple):
    d_hidden, inputs = residuals
    weights = tuple(map(_instantiated, cotangents))
    d_head = None
    if inputs is None:
        d_hidden = (d_hidden * weights[0][..., None]).astype(d_hidden.dtype)
    else:
        # Nothing reads the gradient of a frozen head, so the compiler drops it from the loop.
        student, teacher, targets, mask = inputs
        _, d_hidden, d_head = _sweep(
            form, student, teacher, targets, mask, weights, head_trains=True
        )
    return Side._make((d_hidden, d_head)), None, None, None


_per_position.defvjp(_per_position_forward, _per_position_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(
    form: Form, student: Side, teacher: Side | None, targets: Array, mask: Array, weights: tuple
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    values = _sweep(form, student, teacher, targets, mask).values
    return _weighted_sum(values, weights), values


def _weighted_forward(form: Form, *arguments):
    head_trains = arguments[0].head.perturbed
    student, teacher, targets, mask, weights = jax.tree.map(lambda x: x.value, arguments)
    values, *gradients = _sweep(
        form, student, teacher, targets, mask, weights, head_trains=head_trains
    )
    return (_weighted_sum(values, weights), values), Side._make(gradients)


def _weighted_backward(form: Form, gradients: Side, cotangents: tuple):
    scale = _instantiated(cotangents[0])
    student = jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradients)
    return student, None, None, None, None


_weighted.defvjp(_weighted_forward, _weighted_backward, symbolic_zeros=True)


def _weighted_sum(values: tuple[jax.Array, ...], weights: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.sum(jnp.stack([jnp.sum(x * w) for x, w in zip(values, weights, strict=True)]))


def _instantiated(cotangent: jax.Array | SymbolicZero) -> jax.Array:
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def _sweep(
    form: Form,
    student: Side,
    teacher: Side | None,
    targets: Array,
    mask: Array,
    weights: tuple[jax.Array, ...] | None = None,
    *,
    head_trains: bool = False,
) -> Sweep:
    """Values at the masked positions and, with weights, gradients of their weighted sum."""
    words = student.head.shape[0]
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    plan = Plan(
        form,
        words,
        words if teacher is None else min(words, teacher.head.shape[0]),
        head_trains,
        on_mesh=not alone,
        split=not alone and mesh.shape[VOCAB] > 1,
    )
    if alone:
        return _sweep_on_device(plan, student, teacher, targets, mask, weights)
    rows, head = PartitionSpec(ROWS), PartitionSpec(VOCAB, EMBED)
    if plan.split and teacher is not None:
        # Each device needs the teacher's logits of the words in its slice of the student's head.
        fitted = _fitted(teacher.head, words, axis=0)
        teacher = Side(teacher.hidden, jax.lax.with_sharding_constraint(fitted, head))
    side = Side._make((rows, head))
    return jax.shard_map(
        functools.partial(_sweep_on_device, plan),
        in_specs=(side, None if teacher is None else side, rows, rows, rows),
        out_specs=Sweep._make((rows, rows, head)),
        check_vma=False,
    )(student, teacher, targets, mask, weights)


def _sweep_on_device(
    plan: Plan,
    student: Side,
    teacher: Side | None,
    targets_bs: Array,
    mask_bs: Array,
    weights: tuple[jax.Array, ...] | None,
) -> Sweep:
    """`_sweep` of this device's rows and, if the vocabulary is split, its slice of the words."""

    def flat(x):
        return x.reshape(mask_bs.size, *x.shape[2:])

    def gathered(side):
        return Side(flat(side.hidden), _whole_width(plan, side))

    operands = (
        gathered(student),
        None if teacher is None else gathered(teacher),
        flat(targets_bs),
        flat(mask_bs),
        None if weights is None else tuple(map(flat, weights)),
    )
    if plan.form.chunk is None:
        few = max(CPU_CHUNK, min(CHUNK, CPU_LOGITS // student.head.shape[0]))
        sweep = jax.lax.platform_dependent(
            *operands,
            cpu=functools.partial(_over_chunks, plan, few),
            default=functools.partial(_over_chunks, plan, CHUNK),
        )
    else:
        sweep = _over_chunks(plan, plan.form.chunk, *operands)
    values, d_hidden, d_head = sweep
    if d_hidden is not None:
        d_hidden = d_hidden.reshape(student.hidden.shape)
    if d_head is not None:
        d_head = _own_share(plan, d_head).astype(student.head.dtype)
    return Sweep(tuple(x.reshape(mask_bs.shape) for x in values), d_hidden, d_head)


def _over_chunks(
    plan: Plan,
    chunk: int,
    student: Side,
    teacher: Side | None,
    targets_n: jax.Array,
    mask_n: jax.Array,
    weights: tuple[jax.Array, ...] | None,
) -> Sweep:
    """The loop: values f32[N], d_hidden f[N,D], and d_head f32[W,D], the sum over these rows."""
    hidden, head = student
    indices, chunks = _chunk_indices(mask_n, min(chunk, mask_n.size))
    if plan.split:
        # Devices that exchange numbers in the loop have to take as many turns.
        chunks = jax.lax.pmax(chunks, (*ROWS, VOCAB))

    def body(i, sweep):
        indices_c = indices[i]
        logits = _chunk_logits(student, teacher, indices_c)
        found, gradient = _of_logits(plan, *logits, _take(targets_n, indices_c))
        values = tuple(x.at[indices_c].set(new, mode="drop") for x, new in zip(sweep.values, found))
        if weights is None or sweep.d_hidden is None:
            return Sweep(values, None, None)
        d_logits = gradient([_take(x, indices_c) for x in weights]).astype(hidden.dtype)
        d_rows = jnp.einsum("cv,vd->cd", d_logits, head, preferred_element_type=jnp.float32)
        d_rows = _over_slices(plan, jax.lax.psum, d_rows).astype(hidden.dtype)
        d_hidden = sweep.d_hidden.at[indices_c].set(d_rows, mode="drop")
        if sweep.d_head is None:
            return Sweep(values, d_hidden, None)
        rows = _take(hidden, indices_c)
        d_head = jnp.einsum("cv,cd->vd", d_logits, rows, preferred_element_type=jnp.float32)
        return Sweep(values, d_hidden, sweep.d_head + d_head)

    zeros = Sweep(
        tuple(jnp.zeros(mask_n.shape) for _ in range(1 if teacher is None else 2)),
        None if weights is None else jnp.zeros_like(hidden),
        jnp.zeros(head.shape, jnp.float32) if plan.head_trains else None,
    )
    return jax.lax.fori_loop(0, chunks, body, zeros)


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
    first = jax.lax.axis_index(VOCAB) * width if plan.split else 0
    log_sum = _log_sum_exp(plan, student_cv)
    column = jnp.where(targets_c < first, width, targets_c - first)[:, None]
    at_target = jnp.take_along_axis(student_cv, column, axis=1, mode="fill", fill_value=0)
    log_prob = total(at_target[:, 0]) - log_sum

    def d_log_prob(weights):
        is_target = column == jnp.arange(width)
        return weights[0][:, None] * (is_target - jnp.exp(student_cv - log_sum[:, None]))

    if teacher_cv is None:
        return (log_prob,), d_log_prob

    teacher_cv = _fitted(teacher_cv, width, axis=1)
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
    return reduce(x, VOCAB) if plan.split else x


def _fitted(x: jax.Array, size: int, axis: int) -> jax.Array:
    """The first `size` entries along an axis, with zeros after the last one."""
    x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding)


def _chunk_indices(mask_n: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Indices of the masked positions, in chunks.

    Returns:
      i32[largest number of chunks, C], filled up with N, which is out of bounds; and i32[], the
      number of chunks that hold any masked position.
    """
    size = -(-mask_n.size // chunk) * chunk
    (indices,) = jnp.nonzero(mask_n, size=size, fill_value=mask_n.size)
    return indices.reshape(-1, chunk), -(-jnp.count_nonzero(mask_n) // chunk)


@jax.named_scope("gather_head")
def _whole_width(plan: Plan, side: Side) -> jax.Array:
    """This device's slice of the vocabulary, [W,D] in the dtype of the hidden states."""
    head = side.head.astype(side.hidden.dtype)
    return jax.lax.all_gather(head, EMBED, axis=1, tiled=True) if plan.on_mesh else head


@jax.named_scope("scatter_head_gradient")
def _own_share(plan: Plan, d_head: jax.Array) -> jax.Array:
    """Sums the head's gradient over the devices; each keeps what it holds of the head."""
    if not plan.on_mesh:
        return d_head
    d_head = jax.lax.psum_scatter(d_head, EMBED, scatter_dimension=1, tiled=True)
    return jax.lax.psum(d_head, REPLICAS)


def _chunk_logits(
    student: Side, teacher: Side | None, indices_c: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Logits f32[C,W] of the student and, if there is one, of the teacher."""

    @jax.named_scope("head")
    def logits(side: Side) -> jax.Array:
        rows = _take(side.hidden, indices_c)
        return jnp.einsum("cd,vd->cv", rows, side.head, preferred_element_type=jnp.float32)

    return logits(student), None if teacher is None else logits(teacher)


def _take(x: jax.Array, indices_c: jax.Array) -> jax.Array:
    """x[indices], 0 where an index is out of bounds."""
    return jnp.take(x, indices_c, axis=0, mode="fill", fill_value=0)


def token_log_probs_oracle(
    hidden: jax.Array, head_w_vd: jax.Array, targets: Array, mask: Array
) -> jax.Array:
    """`token_log_probs` from the full logits, for tests and small sizes."""
    logits = jnp.einsum("bsd,vd->bsv", hidden.astype(jnp.float32), head_w_vd)
    log_words = jax.nn.log_softmax(logits, axis=-1)
    log_probs = jnp.take_along_axis(log_words, targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, log_probs, 0)


def token_divergence_oracle(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: Array,
    mask: Array,
) -> tuple[jax.Array, jax.Array]:
    """`token_divergence` from the full logits, for tests and small sizes."""
    shared = min(student_head.shape[0], teacher_head.shape[0])
    student = jnp.einsum("bsd,vd->bsv", student_hidden.astype(jnp.float32), student_head[:shared])
    teacher = jnp.einsum("bsd,vd->bsv", teacher_hidden.astype(jnp.float32), teacher_head[:shared])
    log_student = jax.nn.log_softmax(student, axis=-1)
    log_teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher), axis=-1)
    kl = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    log_probs = token_log_probs_oracle(student_hidden, student_head, targets, mask)
    return log_probs, jnp.where(mask, kl, 0)
