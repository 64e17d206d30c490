"""Losses over the vocabulary that never hold the [B,S,V] array.

Axes: B rows, S positions, N = B * S positions of one device, C positions of a chunk, D width, V vocabulary.

Each device collects the positions that count from its own rows and walks over them in chunks of C: hidden states times
head, a few numbers a position, and the logits are gone. The backward pass makes a chunk's logits again, so nothing
with a vocabulary axis outlives a chunk, and positions that do not count cost nothing in either pass. Logits and the sums of
the head's gradient are float32; matmul inputs have the dtype of the hidden states.

Under the ambient mesh (`jax.set_mesh`) rows stay where they are, and devices that hold the same rows (tensor) share their
positions out. The head is gathered once a pass, in the dtype of the hidden states, and its gradient is summed and scattered
back once, in float32: no device waits for another inside the loop.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mod_jax.sharding import ROWS, RULES

VOCAB, EMBED = (
    RULES["vocab"],
    RULES["embed"],
)  # mesh axes over which a head's two dimensions are split
CHUNK = 512  # positions a device: enough to pay for reading the head once a chunk; 0.3 GB of logits for 150k words


class Terms(typing.NamedTuple):
    """What is computed at each position: `values(student logits, teacher logits, targets)` -> tuple of [C], and
    `d_logits(cotangents of the values, student logits, teacher logits, targets)` -> [C,V], free of scatters and residuals."""

    values: typing.Callable
    d_logits: typing.Callable | None = None


class Side(typing.NamedTuple):
    """One model's hidden states and its head."""

    hidden: jax.Array
    head: jax.Array


def token_log_probs(
    hidden: jax.Array,
    head_w_vd: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    chunk: int = CHUNK,
) -> jax.Array:
    """Log-probability of each target.

    Args:
      hidden: f[B,S,D]; B a multiple of the mesh's row devices, if there is an ambient mesh.
      head_w_vd: f32[V,D], cast to the dtype of `hidden` for the matmul.
      targets: i32[B,S], below V where `mask` holds.
      mask: bool[B,S], the positions that count.
      chunk: positions a device handles at a time.
    Returns:
      f32[B,S], 0 outside the mask. Differentiable in `hidden` and `head_w_vd`.
    """
    (log_probs,) = _over_positions(
        Terms(_log_probs, _d_log_probs), Side(hidden, head_w_vd), None, targets, mask, chunk
    )
    return log_probs


def token_divergence(
    student_hidden: jax.Array, student_head: jax.Array, teacher_hidden: jax.Array, teacher_head: jax.Array, targets: jax.Array, mask: jax.Array,
    *, cross_entropy: bool = False, chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Log-probability of each target, and forward KL(teacher || student) over the vocabulary, from one set of logits.

    The KL compares the first min(V_s, V_t) words, each side renormalised over them; the log-probability is the student's
    over its full vocabulary.

    Args:
      student_hidden, student_head: f[B,S,Ds], f32[Vs,Ds].
      teacher_hidden, teacher_head: f[B,S,Dt], f32[Vt,Dt]; they get no gradient.
      targets, mask, chunk: as in token_log_probs.
      cross_entropy: -sum p_t log p_s in place of the KL (the reference code's value; the gradient is the same).
    Returns:
      (log_probs f32[B,S], divergence f32[B,S]), 0 outside the mask. Differentiable in the student's side.
    """
    shared = min(student_head.shape[0], teacher_head.shape[0])
    terms = Terms(
        functools.partial(_log_probs_and_divergence, shared, cross_entropy),
        functools.partial(_d_log_probs_and_divergence, shared),
    )
    return _over_positions(
        terms,
        Side(student_hidden, student_head),
        Side(teacher_hidden, teacher_head),
        targets,
        mask,
        chunk,
    )


def greedy_tokens(
    hidden: jax.Array, head_w_vd: jax.Array, mask: jax.Array, *, chunk: int = CHUNK
) -> jax.Array:
    """The most probable next token, i32[B,S], 0 outside the mask; arguments as in token_log_probs."""
    (tokens,) = _over_positions(
        Terms(_most_probable),
        Side(hidden, head_w_vd),
        None,
        jnp.zeros(mask.shape, jnp.int32),
        mask,
        chunk,
    )
    return tokens


def _log_probs(logits_cv, _, targets_c):
    at_target = jnp.take_along_axis(logits_cv, targets_c[:, None], axis=-1)[:, 0]
    return (at_target - jax.nn.logsumexp(logits_cv, axis=-1),)


def _d_log_probs(cotangents, logits_cv, _, targets_c):
    (d_log_prob,) = cotangents
    is_target = targets_c[:, None] == jnp.arange(logits_cv.shape[1])
    return d_log_prob[:, None] * (is_target - jax.nn.softmax(logits_cv, axis=-1))


def _log_probs_and_divergence(shared, cross_entropy, student_cv, teacher_cv, targets_c):
    log_student = jax.nn.log_softmax(student_cv[:, :shared], axis=-1)
    log_teacher = jax.nn.log_softmax(teacher_cv[:, :shared], axis=-1)
    gap = -log_student if cross_entropy else log_teacher - log_student
    return *_log_probs(student_cv, None, targets_c), jnp.sum(jnp.exp(log_teacher) * gap, axis=-1)


def _d_log_probs_and_divergence(shared, cotangents, student_cv, teacher_cv, targets_c):
    d_log_prob, d_divergence = cotangents
    gap = jax.nn.softmax(student_cv[:, :shared], axis=-1) - jax.nn.softmax(
        teacher_cv[:, :shared], axis=-1
    )
    gap = jnp.pad(gap, ((0, 0), (0, student_cv.shape[1] - shared)))
    return d_divergence[:, None] * gap + _d_log_probs((d_log_prob,), student_cv, None, targets_c)


def _most_probable(logits_cv, _, __):
    return (jnp.argmax(logits_cv, axis=-1).astype(jnp.int32),)


def _over_positions(
    terms, student: Side, teacher: Side | None, targets_bs, mask_bs, chunk: int
) -> tuple[jax.Array, ...]:
    """The values of `terms` at the mask's positions, each [B,S]; 0 elsewhere."""

    def on_device(spread, student, teacher, targets_bs, mask_bs):
        flat = functools.partial(jax.tree.map, lambda x: x.reshape(mask_bs.size, *x.shape[2:]))
        sides = [side and Side(flat(side.hidden), side.head) for side in (student, teacher)]
        mask_n = _share(flat(mask_bs)) if spread else flat(mask_bs)
        outputs = _chunked(
            terms, min(chunk, mask_bs.size), spread, *sides, flat(targets_bs), mask_n
        )
        outputs = tuple(x.reshape(mask_bs.shape) for x in outputs)
        return jax.lax.psum(outputs, VOCAB) if spread else outputs

    if jax.sharding.get_abstract_mesh().empty:
        return on_device(False, student, teacher, targets_bs, mask_bs)
    rows = PartitionSpec(ROWS)
    side = Side(rows, PartitionSpec(VOCAB, EMBED))
    specs = (side, teacher and side, rows, rows)
    return jax.shard_map(
        functools.partial(on_device, True), in_specs=specs, out_specs=rows, check_vma=False
    )(student, teacher, targets_bs, mask_bs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(terms, chunk, spread, student, teacher, targets_n, mask_n):
    return _forward(terms, chunk, spread, student, teacher, targets_n, mask_n)[0]


def _forward(terms, chunk, spread, student, teacher, targets_n, mask_n):
    places, chunks = _places(mask_n, chunk)
    sides = _whole_heads(spread, student, teacher)

    def values(at):
        return terms.values(*_chunk_logits(sides, at), _take(targets_n, at))

    def body(i, outputs):
        return tuple(
            output.at[places[i]].set(value, mode="drop")
            for output, value in zip(outputs, values(places[i]))
        )

    outputs = tuple(jnp.zeros(mask_n.shape, x.dtype) for x in jax.eval_shape(values, places[0]))
    return jax.lax.fori_loop(0, chunks, body, outputs), (
        student,
        teacher,
        targets_n,
        places,
        chunks,
    )


def _backward(terms, chunk, spread, residuals, cotangents):
    student, teacher, targets_n, places, chunks = residuals
    sides = _whole_heads(spread, student, teacher)
    hidden, head = sides[0]

    def body(i, gradients):
        d_hidden, d_head = gradients
        at = places[i]
        d_values = tuple(_take(c, at) for c in cotangents)
        d_logits = terms.d_logits(d_values, *_chunk_logits(sides, at), _take(targets_n, at)).astype(
            hidden.dtype
        )
        d_rows = jnp.einsum("cv,vd->cd", d_logits, head, preferred_element_type=jnp.float32)
        d_head += jnp.einsum(
            "cv,cd->vd", d_logits, _take(hidden, at), preferred_element_type=jnp.float32
        )
        return d_hidden.at[at].set(d_rows.astype(hidden.dtype), mode="drop"), d_head

    # A frozen head's gradient is nobody's input: the compiler drops it from the loop.
    d_hidden, d_head = jax.lax.fori_loop(
        0, chunks, body, (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    )
    if spread:
        d_head = jax.lax.psum_scatter(d_head, EMBED, scatter_dimension=1, tiled=True)
        d_head = jax.lax.psum_scatter(d_head, VOCAB, scatter_dimension=0, tiled=True)
    return Side(d_hidden, d_head.astype(student.head.dtype)), None, None, None


_chunked.defvjp(_forward, _backward)


def _share(mask_n):
    """This device's part of the positions: of the devices with the same rows, each takes every so-manieth that counts."""
    return mask_n & (jnp.cumsum(mask_n) % jax.lax.axis_size(VOCAB) == jax.lax.axis_index(VOCAB))


def _places(mask_n, chunk) -> tuple[jax.Array, jax.Array]:
    """Where the mask holds: i32[chunks at most, C], filled up with N (outside), and the number of chunks that hold any."""
    size = -(-mask_n.size // chunk) * chunk
    (places,) = jnp.nonzero(mask_n, size=size, fill_value=mask_n.size)
    return places.reshape(-1, chunk), -(-jnp.count_nonzero(mask_n) // chunk)


def _whole_heads(spread, *sides):
    """The sides with their whole heads, in the dtype of the hidden states."""

    def whole(side):
        head = side.head.astype(side.hidden.dtype)
        if spread:
            head = jax.lax.all_gather(head, VOCAB, axis=0, tiled=True)
            head = jax.lax.all_gather(head, EMBED, axis=1, tiled=True)
        return Side(side.hidden, head)

    return [side and whole(side) for side in sides]


def _chunk_logits(sides, places_c):
    return [
        side
        and jnp.einsum(
            "cd,vd->cv", _take(side.hidden, places_c), side.head, preferred_element_type=jnp.float32
        )
        for side in sides
    ]


def _take(x, places_c):
    return jnp.take(x, places_c, axis=0, mode="fill", fill_value=0)


def token_log_probs_oracle(hidden, head_w_vd, targets, mask):
    """`token_log_probs` from the full logits, for tests and small sizes."""
    logits = jnp.einsum("bsd,vd->bsv", hidden.astype(jnp.float32), head_w_vd)
    log_probs = jnp.take_along_axis(
        jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1
    )[..., 0]
    return jnp.where(mask, log_probs, 0)


def token_divergence_oracle(
    student_hidden, student_head, teacher_hidden, teacher_head, targets, mask
):
    """`token_divergence` from the full logits, for tests and small sizes."""
    shared = min(student_head.shape[0], teacher_head.shape[0])
    student = jnp.einsum("bsd,vd->bsv", student_hidden.astype(jnp.float32), student_head[:shared])
    teacher = jax.lax.stop_gradient(
        jnp.einsum("bsd,vd->bsv", teacher_hidden.astype(jnp.float32), teacher_head[:shared])
    )
    log_student, log_teacher = (
        jax.nn.log_softmax(student, axis=-1),
        jax.nn.log_softmax(teacher, axis=-1),
    )
    kl = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return token_log_probs_oracle(student_hidden, student_head, targets, mask), jnp.where(
        mask, kl, 0
    )


def greedy_tokens_oracle(hidden, head_w_vd, mask):
    """`greedy_tokens` from the full logits, for tests and small sizes."""
    return jnp.where(
        mask,
        jnp.argmax(jnp.einsum("bsd,vd->bsv", hidden.astype(jnp.float32), head_w_vd), axis=-1),
        0,
    )
