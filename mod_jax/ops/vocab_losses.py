"""Losses over the vocabulary that never hold the logits [B,S,V] of a whole batch.

Axes: B rows, S positions, N = B * S positions of one device, C positions of a chunk, D width,
V vocabulary.

Each device collects the masked positions of its own rows and walks over them in chunks of C. For a
chunk it multiplies hidden states with the head, reduces the logits to a few numbers per position,
and discards them. The backward pass computes the logits of a chunk again. So no array with a
vocabulary axis outlives its chunk (only the head and its gradient have one), and positions outside
the mask cost nothing in either pass. Logits and the sums of the head's gradient are float32; the
inputs of matmuls have the dtype of the hidden states.

Under the ambient mesh (`jax.set_mesh`) rows stay on their devices, and the devices that hold the
same rows (those along `tensor`) split the masked positions among them. Each pass gathers the head
once, in the dtype of the hidden states, and its gradient is summed and scattered back once, in
float32: no device waits for another inside the loop.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mod_jax.batch import Array
from mod_jax.sharding import ROWS, RULES

# Mesh axes over which the two dimensions of a head are split.
VOCAB = RULES["vocab"]
EMBED = RULES["embed"]
# Positions per device and chunk: enough to pay for reading the head once per chunk. With 150k words
# the logits of a chunk take 0.3 GB.
CHUNK = 512


class Terms(NamedTuple):
    """What is computed at each position of a chunk.

    Attributes:
      values: (student logits, teacher logits or None, targets) -> tuple of f32[C].
      d_logits: (cotangents of the values, student logits, teacher logits or None, targets) ->
        cotangent f32[C,V] of the student logits, computed without scatters and residuals.
    """

    values: Callable[..., tuple[jax.Array, ...]]
    d_logits: Callable[..., jax.Array]


class Side(NamedTuple):
    """Hidden states and output head of one model, the student or the teacher."""

    hidden: jax.Array
    head: jax.Array


def token_log_probs(
    hidden: jax.Array,
    head_w_vd: jax.Array,
    targets: Array,
    mask: Array,
    *,
    chunk: int = CHUNK,
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
      chunk: Positions that a device computes at a time.

    Returns:
      f32[B,S], 0 outside the mask. Differentiable with respect to `hidden` and `head_w_vd`.
    """
    (log_probs,) = _over_positions(
        Terms(_log_probs, _d_log_probs), Side(hidden, head_w_vd), None, targets, mask, chunk
    )
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
    chunk: int = CHUNK,
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
    shared = min(student_head.shape[0], teacher_head.shape[0])
    terms = Terms(
        functools.partial(_log_probs_and_divergence, shared, cross_entropy),
        functools.partial(_d_log_probs_and_divergence, shared),
    )
    student = Side(student_hidden, student_head)
    teacher = Side(teacher_hidden, teacher_head)
    log_probs, divergence = _over_positions(terms, student, teacher, targets, mask, chunk)
    return log_probs, divergence


def _log_probs(logits_cv: jax.Array, _: None, targets_c: jax.Array) -> tuple[jax.Array]:
    at_target = jnp.take_along_axis(logits_cv, targets_c[:, None], axis=-1)[:, 0]
    return (at_target - jax.nn.logsumexp(logits_cv, axis=-1),)


def _d_log_probs(
    cotangents: tuple[jax.Array], logits_cv: jax.Array, _: None, targets_c: jax.Array
) -> jax.Array:
    (d_log_prob,) = cotangents
    is_target = targets_c[:, None] == jnp.arange(logits_cv.shape[1])
    return d_log_prob[:, None] * (is_target - jax.nn.softmax(logits_cv, axis=-1))


def _log_probs_and_divergence(
    shared: int,
    cross_entropy: bool,
    student_cv: jax.Array,
    teacher_cv: jax.Array,
    targets_c: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    log_student = jax.nn.log_softmax(student_cv[:, :shared], axis=-1)
    log_teacher = jax.nn.log_softmax(teacher_cv[:, :shared], axis=-1)
    gap = -log_student if cross_entropy else log_teacher - log_student
    (log_probs,) = _log_probs(student_cv, None, targets_c)
    return log_probs, jnp.sum(jnp.exp(log_teacher) * gap, axis=-1)


def _d_log_probs_and_divergence(
    shared: int,
    cotangents: tuple[jax.Array, jax.Array],
    student_cv: jax.Array,
    teacher_cv: jax.Array,
    targets_c: jax.Array,
) -> jax.Array:
    d_log_prob, d_divergence = cotangents
    student = jax.nn.softmax(student_cv[:, :shared], axis=-1)
    gap = student - jax.nn.softmax(teacher_cv[:, :shared], axis=-1)
    gap = jnp.pad(gap, ((0, 0), (0, student_cv.shape[1] - shared)))
    return d_divergence[:, None] * gap + _d_log_probs((d_log_prob,), student_cv, None, targets_c)


def _over_positions(
    terms: Terms, student: Side, teacher: Side | None, targets_bs: Array, mask_bs: Array, chunk: int
) -> tuple[jax.Array, ...]:
    """The values of `terms` at the masked positions, each f32[B,S]; 0 elsewhere."""

    def on_device(on_mesh, student, teacher, targets_bs, mask_bs):
        def flat(x):
            return x.reshape(mask_bs.size, *x.shape[2:])

        student = Side(flat(student.hidden), student.head)
        if teacher is not None:
            teacher = Side(flat(teacher.hidden), teacher.head)
        mask_n = _own_positions(flat(mask_bs)) if on_mesh else flat(mask_bs)
        positions = min(chunk, mask_bs.size)
        outputs = _chunked(terms, positions, on_mesh, student, teacher, flat(targets_bs), mask_n)
        outputs = tuple(x.reshape(mask_bs.shape) for x in outputs)
        return jax.lax.psum(outputs, VOCAB) if on_mesh else outputs

    if jax.sharding.get_abstract_mesh().empty:
        return on_device(False, student, teacher, targets_bs, mask_bs)
    rows = PartitionSpec(ROWS)
    side = Side._make((rows, PartitionSpec(VOCAB, EMBED)))
    specs = (side, None if teacher is None else side, rows, rows)
    return jax.shard_map(
        functools.partial(on_device, True), in_specs=specs, out_specs=rows, check_vma=False
    )(student, teacher, targets_bs, mask_bs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(
    terms: Terms,
    chunk: int,
    on_mesh: bool,
    student: Side,
    teacher: Side | None,
    targets_n: jax.Array,
    mask_n: jax.Array,
) -> tuple[jax.Array, ...]:
    """The values of `terms` at this device's masked positions, each f32[N]; 0 elsewhere."""
    return _forward(terms, chunk, on_mesh, student, teacher, targets_n, mask_n)[0]


def _forward(
    terms: Terms,
    chunk: int,
    on_mesh: bool,
    student: Side,
    teacher: Side | None,
    targets_n: jax.Array,
    mask_n: jax.Array,
):
    indices, chunks = _chunk_indices(mask_n, chunk)
    whole_student, whole_teacher = _whole_heads(on_mesh, student, teacher)

    def values(indices_c):
        logits = _chunk_logits(whole_student, whole_teacher, indices_c)
        return terms.values(*logits, _take(targets_n, indices_c))

    def body(i, outputs):
        return tuple(
            output.at[indices[i]].set(value, mode="drop")
            for output, value in zip(outputs, values(indices[i]))
        )

    outputs = tuple(jnp.zeros(mask_n.shape, x.dtype) for x in jax.eval_shape(values, indices[0]))
    residuals = (student, teacher, targets_n, indices, chunks)
    return jax.lax.fori_loop(0, chunks, body, outputs), residuals


def _backward(terms: Terms, chunk: int, on_mesh: bool, residuals: tuple, cotangents: tuple):
    student, teacher, targets_n, indices, chunks = residuals
    whole_student, whole_teacher = _whole_heads(on_mesh, student, teacher)
    hidden, head = whole_student

    def body(i, gradients):
        d_hidden, d_head = gradients
        indices_c = indices[i]
        d_values = tuple(_take(c, indices_c) for c in cotangents)
        logits = _chunk_logits(whole_student, whole_teacher, indices_c)
        d_logits = terms.d_logits(d_values, *logits, _take(targets_n, indices_c))
        d_logits = d_logits.astype(hidden.dtype)
        d_rows = jnp.einsum("cv,vd->cd", d_logits, head, preferred_element_type=jnp.float32)
        rows = _take(hidden, indices_c)
        d_head += jnp.einsum("cv,cd->vd", d_logits, rows, preferred_element_type=jnp.float32)
        d_hidden = d_hidden.at[indices_c].set(d_rows.astype(hidden.dtype), mode="drop")
        return d_hidden, d_head

    # Nothing reads the gradient of a frozen head, so the compiler drops it from the loop.
    zeros = (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    d_hidden, d_head = jax.lax.fori_loop(0, chunks, body, zeros)
    if on_mesh:
        with jax.named_scope("scatter_head_gradient"):
            d_head = jax.lax.psum_scatter(d_head, EMBED, scatter_dimension=1, tiled=True)
            d_head = jax.lax.psum_scatter(d_head, VOCAB, scatter_dimension=0, tiled=True)
    return Side(d_hidden, d_head.astype(student.head.dtype)), None, None, None


_chunked.defvjp(_forward, _backward)


def _own_positions(mask_n: jax.Array) -> jax.Array:
    """The part of the mask that this device computes, bool[N].

    Devices that hold the same rows split the masked positions round-robin.
    """
    turn = jnp.cumsum(mask_n) % jax.lax.axis_size(VOCAB)
    return mask_n & (turn == jax.lax.axis_index(VOCAB))


def _chunk_indices(mask_n: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Indices of the masked positions, in chunks.

    Returns:
      i32[largest number of chunks, C], filled up with N, which is out of bounds; and i32[], the
      number of chunks that hold any masked position.
    """
    size = -(-mask_n.size // chunk) * chunk
    (indices,) = jnp.nonzero(mask_n, size=size, fill_value=mask_n.size)
    return indices.reshape(-1, chunk), -(-jnp.count_nonzero(mask_n) // chunk)


def _whole_heads(on_mesh: bool, student: Side, teacher: Side | None) -> tuple[Side, Side | None]:
    """Both sides with their whole heads, gathered in the dtype of the hidden states."""

    @jax.named_scope("gather_head")
    def whole(side: Side) -> Side:
        head = side.head.astype(side.hidden.dtype)
        if on_mesh:
            head = jax.lax.all_gather(head, VOCAB, axis=0, tiled=True)
            head = jax.lax.all_gather(head, EMBED, axis=1, tiled=True)
        return Side(side.hidden, head)

    return whole(student), None if teacher is None else whole(teacher)


def _chunk_logits(
    student: Side, teacher: Side | None, indices_c: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Logits f32[C,V] of the student and, if there is one, of the teacher."""

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
