"""Losses over the vocabulary that never hold the logits [B,S,V] of a whole batch.

Axes: B rows, S positions, N = B * S positions of one device, C positions of a block, D width,
V vocabulary, W words of the slice that one device holds.

Each device collects the masked positions of its own rows and walks over them in blocks. For a block
it multiplies hidden states with the head, reduces the logits to a few numbers per position, and
discards them. So no array with a vocabulary axis outlives its block (only the head and its gradient
have one), and positions outside the mask cost nothing. Logits and the sums of the head's gradient
are float32; the inputs of matmuls have the dtype of the hidden states.

A block is a chunk of positions with all words (`vocab_chunks`), or on a CPU, if the head is frozen,
a tile of some words (`vocab_tiles`). Both are held to the oracles below.

**One sweep over the head makes values and gradients.** While a block's logits are there, the sweep
also makes the gradient of their weighted sum, and the backward pass only scales it. That needs the
weights of the positions beforehand:

- `weighted_log_probs` and `weighted_divergence` get them, so only one scale is left unknown.
- Of `token_log_probs` every position has a scale of its own, which only the backward pass knows. If
  the head is frozen, scaling the gradient rows [N,D] is exact. If it trains, its gradient sums over
  positions, and the backward pass is a second sweep.

Without differentiation a sweep makes values alone, and nothing is made for a frozen head.

Under the ambient mesh (`jax.set_mesh`) no device holds a whole head where `tensor` or `expert` has
several devices. They keep slices of the vocabulary, and softmaxes are put together from maxima and
sums. Devices along `tensor` have the same rows; those along `expert` get each other's hidden
states, which are fewer numbers than a head's, and give back the gradients in them. Along `fsdp`,
which splits a head's width, each device gathers its slice [W,D] once, in the dtype of the hidden
states; the head's gradient is summed and scattered back once, in float32. The alternative, to
exchange partial logits, moves W float32 numbers for every counted position of all those devices,
and together these outnumber D.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from mod_jax.batch import Array
from mod_jax.ops.embedding import TABLE_AXES
from mod_jax.ops.vocab_chunks import fitted, sweep_chunks
from mod_jax.ops.vocab_sweep import Block, Form, Plan, Side, Sweep
from mod_jax.ops.vocab_tiles import sweep_tiles
from mod_jax.ops.weights import own_share, whole
from mod_jax.sharding import ROWS, ambient_mesh, mesh_axes, partition

# An accelerator needs enough positions to pay for reading the head once per chunk: C operations per
# number read.
CHUNK = 512
# A CPU needs few enough for the logits to stay small.
CPU_CHUNK = 64
CPU_LOGITS = 2**23  # a smaller vocabulary takes chunks of more positions, up to this many logits
CPU_TILE = Block(256, 1024)  # logits that stay in its caches


def token_log_probs(
    hidden: jax.Array,
    head_w_vd: jax.Array,
    targets: Array,
    mask: Array,
    *,
    block: Block | None = None,
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
      block: What a device holds of the logits at a time; None chooses by platform. Words are cut
        only where the head is frozen and the device holds all of them.

    Returns:
      f32[B,S], 0 outside the mask. Differentiable with respect to `hidden` and `head_w_vd`.
    """
    return _per_position(Form(block), Side(hidden, head_w_vd), targets, mask)


def weighted_log_probs(
    hidden: jax.Array,
    head_w_vd: jax.Array,
    targets: Array,
    mask: Array,
    weights: jax.Array,
    *,
    block: Block | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of `token_log_probs`, whose gradient costs no second sweep over the head.

    Args:
      hidden, head_w_vd, targets, mask, block: As in `token_log_probs`.
      weights: f32[B,S], without a gradient.

    Returns:
      (sum of weight times log-probability over the mask f32[], log-probabilities f32[B,S]). The sum
      is differentiable with respect to `hidden` and `head_w_vd`, the log-probabilities have no
      gradient.
    """
    student = Side(hidden, head_w_vd)
    total, (log_probs,) = _weighted(Form(block), student, None, targets, mask, (weights,))
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
    block: Block | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sum of `token_log_probs` and of the forward KL(teacher || student) over the words.

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
      targets, mask, block: As in `token_log_probs`.
      log_prob_weights, divergence_weights: f32[B,S], without a gradient.
      cross_entropy: Take the cross-entropy -sum p_t log p_s instead of the KL. The reference code
        reports that value; the gradient is the same.

    Returns:
      (sum over the mask of both values times their weights f32[], log-probabilities f32[B,S],
      divergences f32[B,S]), 0 outside the mask. The sum is differentiable with respect to the
      student's hidden states and head, the other two have no gradient.
    """
    student = Side(student_hidden, student_head)
    teacher = Side(teacher_hidden, teacher_head)
    weights = (log_prob_weights, divergence_weights)
    form = Form(block, cross_entropy)
    total, values = _weighted(form, student, teacher, targets, mask, weights)
    log_probs, divergence = jax.lax.stop_gradient(values)
    return total, log_probs, divergence


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_position(form: Form, student: Side, targets: Array, mask: Array) -> jax.Array:
    return _sweep(form, student, None, targets, mask).values[0]


def _per_position_forward(form: Form, *arguments):
    head_trains = arguments[0].head.perturbed
    student, targets, mask = jax.tree.map(lambda x: x.value, arguments)
    if head_trains:
        return _per_position(form, student, targets, mask), (None, (student, targets, mask))
    sweep = _sweep(form, student, None, targets, mask, (jnp.ones(mask.shape),))
    return sweep.values[0], (sweep.d_hidden, None)


def _per_position_backward(form: Form, residuals: tuple, cotangent: jax.Array | SymbolicZero):
    d_hidden, inputs = residuals
    weights = _instantiated(cotangent)
    if inputs is None:
        d_hidden = (d_hidden * weights[..., None]).astype(d_hidden.dtype)
        return Side._make((d_hidden, None)), None, None
    student, targets, mask = inputs
    _, *gradients = _sweep(form, student, None, targets, mask, (weights,), head_trains=True)
    return Side._make(gradients), None, None


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
    shared = words if teacher is None else min(words, teacher.head.shape[0])
    plan = Plan(form, words, shared, head_trains)
    mesh = ambient_mesh()
    if mesh is None:
        sweep = _sweep_on_device(plan, student, teacher, targets, mask, weights)
        d_head = None if sweep.d_head is None else sweep.d_head.astype(student.head.dtype)
        return sweep._replace(d_head=d_head)
    lies = partition(mesh, student.head.shape, TABLE_AXES)
    plan = plan._replace(slices=mesh_axes(lies[0]))
    rows, teacher_lies = PartitionSpec(ROWS), None
    if teacher is not None:
        # Each device needs the teacher's logits of the words in its slice of the student's head.
        head = fitted(teacher.head, words, axis=0) if plan.slices else teacher.head
        teacher_lies = PartitionSpec(lies[0], partition(mesh, head.shape, TABLE_AXES)[1])
        teacher = Side(teacher.hidden, jax.lax.with_sharding_constraint(head, teacher_lies))
    return jax.shard_map(
        functools.partial(_sweep_on_mesh, plan, lies, teacher_lies),
        in_specs=(
            Side._make((rows, lies)),
            None if teacher is None else Side._make((rows, teacher_lies)),
            rows,
            rows,
            rows,
        ),
        out_specs=Sweep._make((rows, rows, lies)),
        check_vma=False,
    )(student, teacher, targets, mask, weights)


def _sweep_on_mesh(
    plan: Plan,
    student_lies: PartitionSpec,
    teacher_lies: PartitionSpec | None,
    student: Side,
    teacher: Side | None,
    *rows,
) -> Sweep:
    """`_sweep_on_device` within `jax.shard_map`, of this device's rows and words.

    Devices that share out the vocabulary compute their words for the rows of all of them, and then
    add up what belongs to a row.

    Args:
      plan: What to make.
      student_lies, teacher_lies: Mesh axes of the heads' dimensions.
      student, teacher: This device's rows and its part of the heads.
      rows: targets, mask and weights of these rows.
    """
    readers = tuple(axis for axis in plan.slices if axis in ROWS)
    others = tuple(axis for axis in plan.slices if axis not in ROWS)

    def of_all(x):
        return jax.lax.all_gather(x, readers, tiled=True) if readers else x

    def side(of, lies):
        return Side(of_all(of.hidden), _whole_width(of, lies))

    sweep = _sweep_on_device(
        plan,
        side(student, student_lies),
        None if teacher is None else side(teacher, teacher_lies),
        *jax.tree.map(of_all, rows),
    )
    values, d_hidden, d_head = sweep
    if readers:
        # All of them have made the values of all rows.
        mine = jax.lax.axis_index(readers) * len(student.hidden)
        values = tuple(jax.lax.dynamic_slice_in_dim(x, mine, len(student.hidden)) for x in values)
    if d_hidden is not None:
        for axis in readers:
            d_hidden = jax.lax.psum_scatter(d_hidden, axis, tiled=True)
        d_hidden = jax.lax.psum(d_hidden, others) if others else d_hidden
        d_hidden = d_hidden.astype(student.hidden.dtype)
    if d_head is not None:
        with jax.named_scope("scatter_head_gradient"):
            width = PartitionSpec(None, student_lies[1])
            split = tuple(axis for axis in ROWS if axis not in readers)
            d_head = own_share(d_head, width, split).astype(student.head.dtype)
    return Sweep(values, d_hidden, d_head)


def _sweep_on_device(
    plan: Plan,
    student: Side,
    teacher: Side | None,
    targets_bs: Array,
    mask_bs: Array,
    weights: tuple[jax.Array, ...] | None,
) -> Sweep:
    """`_sweep` of these rows and the words of these heads; the gradient of a head is float32."""

    def flat(x):
        return x.reshape(mask_bs.size, *x.shape[2:])

    def in_dtype(side):
        return Side(flat(side.hidden), side.head.astype(side.hidden.dtype))

    operands = (
        in_dtype(student),
        None if teacher is None else in_dtype(teacher),
        flat(targets_bs),
        flat(mask_bs),
        None if weights is None else tuple(map(flat, weights)),
    )
    if plan.form.block is None:
        few = max(CPU_CHUNK, min(CHUNK, CPU_LOGITS // student.head.shape[0]))
        sweep = jax.lax.platform_dependent(
            *operands,
            cpu=_in_blocks(plan, CPU_TILE if _may_cut_words(plan) else Block(few)),
            default=_in_blocks(plan, Block(CHUNK)),
        )
    else:
        sweep = _in_blocks(plan, plan.form.block)(*operands)
    values, d_hidden, d_head = sweep
    if d_hidden is not None:
        d_hidden = d_hidden.reshape(student.hidden.shape)
    return Sweep(tuple(x.reshape(mask_bs.shape) for x in values), d_hidden, d_head)


def _may_cut_words(plan: Plan) -> bool:
    return not (plan.head_trains or plan.slices)


def _in_blocks(plan: Plan, block: Block) -> Callable[..., Sweep]:
    """The sweep of one device with blocks of this size."""
    if block.words and _may_cut_words(plan):
        return functools.partial(sweep_tiles, block.positions, block.words, plan)
    return functools.partial(sweep_chunks, block.positions, plan)


@jax.named_scope("gather_head")
def _whole_width(side: Side, lies: PartitionSpec) -> jax.Array:
    """This device's slice of the vocabulary, [W,D] in the dtype of the hidden states."""
    return whole(side.head.astype(side.hidden.dtype), PartitionSpec(None, lies[1]))


def token_log_probs_oracle(
    hidden: jax.Array, head_w_vd: jax.Array, targets: Array, mask: Array
) -> jax.Array:
    """`token_log_probs` from the full logits, for tests and small sizes."""
    logits = jnp.einsum("bsd,vd->bsv", hidden.astype(jnp.float32), head_w_vd)
    log_words = jax.nn.log_softmax(logits, axis=-1)
    log_probs = jnp.take_along_axis(log_words, targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, log_probs, 0)


def divergence_oracle(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: Array,
    mask: Array,
) -> tuple[jax.Array, jax.Array]:
    """The values of `weighted_divergence` from the full logits, for tests and small sizes."""
    shared = min(student_head.shape[0], teacher_head.shape[0])
    student = jnp.einsum("bsd,vd->bsv", student_hidden.astype(jnp.float32), student_head[:shared])
    teacher = jnp.einsum("bsd,vd->bsv", teacher_hidden.astype(jnp.float32), teacher_head[:shared])
    log_student = jax.nn.log_softmax(student, axis=-1)
    log_teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher), axis=-1)
    kl = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    log_probs = token_log_probs_oracle(student_hidden, student_head, targets, mask)
    return log_probs, jnp.where(mask, kl, 0)
