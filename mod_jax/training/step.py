"""The train step, the same for every stage, every objective and any mesh.

Equivalent to: the loss of the whole global batch at once, differentiated with respect to the
trained parameters, and one AdamW update. Micro-batches only bound the memory: each contributes its
share of the global batch's loss, because the sums that losses are divided by (`objectives.Totals`)
are taken over the whole batch before the first micro-batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mod_jax import objectives, sharding
from mod_jax.batch import Batch
from mod_jax.config import ModelConfig, ObjectiveConfig, StageConfig
from mod_jax.models import llava
from mod_jax.models.moe import MoEAux
from mod_jax.training.int8 import Int8, scales_sharding
from mod_jax.training.state import (
    Frozen,
    TrainState,
    make_schedule,
    may_be_int8,
    state_shardings,
    updates_done,
)


def views(
    student: ModelConfig, teacher: ModelConfig | None, params: dict, frozen: Frozen, batch: Batch
) -> tuple[objectives.View, objectives.View | None, MoEAux]:
    """Runs the student and, if there is one, the teacher.

    The vision tower, the student's, runs once; both read its features.

    Args:
      student: Configuration of the student.
      teacher: Configuration of the teacher, or None.
      params: Name -> array, the trained part of the student.
      frozen: The frozen part of the student, and the teacher.
      batch: Packed rows.

    Returns:
      (View of the student, View of the teacher or None, MoEAux of the student).
    """
    student_view, features, aux = _run_student(student, params, frozen, batch)
    if teacher is None:
        return student_view, None, aux
    return student_view, _run_teacher(teacher, frozen, batch, features), aux


def _run_student(
    student: ModelConfig, params: dict, frozen: Frozen, batch: Batch
) -> tuple[objectives.View, jax.Array, MoEAux]:
    """The student's View, the features of the pictures f[B, N * features, Dv], and MoEAux."""
    weights = {**params, **frozen.student}
    model = llava.bind(student, weights)
    features = model.features(batch.images)
    with jax.named_scope("student"):
        hidden, aux = model(batch, features)
    return objectives.View(hidden, llava.head(student, weights)), features, aux


def _run_teacher(
    teacher: ModelConfig, frozen: Frozen, batch: Batch, features: jax.Array
) -> objectives.View:
    """The teacher's View, without gradients."""
    model = llava.bind(teacher, frozen.teacher, with_tower=False)
    with jax.named_scope("teacher"):
        hidden, _ = model(batch, features.astype(teacher.dtype))
    return jax.lax.stop_gradient(objectives.View(hidden, llava.head(teacher, frozen.teacher)))


def micro_batches(batch: Batch, count: int) -> Batch:
    """Splits the rows of a batch into micro-batches.

    Row i goes to micro-batch i % count. Each device then splits its own rows: none is moved.

    Args:
      batch: With a number of rows that `count` divides.
      count: Number of micro-batches.

    Returns:
      A batch whose fields are [count, rows / count, ...].
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch
    )


def gradients(
    objective: ObjectiveConfig,
    accumulation: int,
    student: ModelConfig,
    teacher: ModelConfig | None,
    params: dict,
    frozen: Frozen,
    batch: Batch,
) -> tuple[dict, dict]:
    """Gradient of the global batch's loss, and its metrics.

    Args:
      objective: What is minimised.
      accumulation: Number of micro-batches.
      student: Configuration of the student.
      teacher: Configuration of the teacher; None if the objective needs none.
      params: Name -> array, the trained part of the student.
      frozen: The frozen part of the student, and the teacher.
      batch: The global batch.

    Returns:
      (gradient: name -> f32 array, metrics: name -> (sum f32[], count f32[])).
    """
    totals = objectives.totals(objective, batch)

    def loss(params: dict, micro: Batch, pair_means):
        student_view, teacher_view, aux = views(student, teacher, params, frozen, micro)
        return objectives.loss(
            objective, micro, student_view, teacher_view, aux, totals, pair_means
        )

    differentiate = jax.value_and_grad(loss, has_aux=True)
    if accumulation == 1:
        (value, metrics), gradient = differentiate(params, batch, None)
        return gradient, {**metrics, "loss": (value, jnp.ones(()))}

    micros = micro_batches(batch, accumulation)
    pair_means = None
    uses_pair_means = objective.kind == "preference" and objective.preference == "kto_pair"
    if teacher is not None and uses_pair_means and not objective.compat:
        # KTO's KL estimates are means over the global batch, needed before the first gradient. They
        # cost one more forward pass.
        def add_ratios(sums, micro: Batch):
            student_view, features, _ = _run_student(student, params, frozen, micro)
            teacher_view = _run_teacher(teacher, frozen, micro, features)
            chosen, rejected, valid = objectives.pair_ratios(micro, student_view, teacher_view)
            return (sums[0] + jnp.sum(chosen * valid), sums[1] + jnp.sum(rejected * valid)), None

        with jax.named_scope("pair_means"):
            (chosen, rejected), _ = jax.lax.scan(add_ratios, (jnp.zeros(()), jnp.zeros(())), micros)
        pair_means = (
            chosen / jnp.maximum(totals.pairs, 1),
            rejected / jnp.maximum(totals.pairs, 1),
        )

    def contribution(micro: Batch):
        (value, metrics), gradient = differentiate(params, micro, pair_means)
        return gradient, value, metrics

    shapes = jax.eval_shape(contribution, jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (gradient, value, metrics), _ = jax.lax.scan(
        lambda sums, micro: (jax.tree.map(jnp.add, sums, contribution(micro)), None),
        zeros,
        micros,
    )
    return gradient, {**metrics, "loss": (value, jnp.ones(()))}


def train_step(
    stage: StageConfig,
    student: ModelConfig,
    teacher: ModelConfig | None,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
) -> tuple[TrainState, dict]:
    """One update: a pure function, which `make_train_step` compiles.

    Where the loss or the gradient's norm is not finite, the update is skipped: parameters and
    optimizer state, with its count for the schedule, stay as they are. Only `state.step`
    advances, because it counts batches. The metrics of such a step have the count 0, so that they
    enter no mean.

    Args:
      stage: Configuration of the stage.
      student: Configuration of the student.
      teacher: Configuration of the teacher; None if the objective needs none.
      optimizer: From `make_optimizer`.
      state: State before the step.
      frozen: The frozen part of the student, and the teacher.
      batch: The global batch.

    Returns:
      (state after the step, metrics: name -> (sum f32[], count f32[])). The sum of `nonfinite` is 1
      if the update was skipped, else 0.
    """
    gradient, metrics = gradients(
        stage.objective, stage.accumulation, student, teacher, state.params, frozen, batch
    )
    one = jnp.ones(())
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(metrics["loss"][0]) & jnp.isfinite(norm)
    with jax.named_scope("optimizer"):
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params, moments = jax.tree.map(
            functools.partial(jnp.where, finite), (params, moments), (state.params, state.optimizer)
        )
    metrics |= {"gradient_norm": (norm, one)}
    metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0), metrics)
    metrics |= {
        "nonfinite": (1 - finite.astype(jnp.float32), one),
        "lr": (make_schedule(stage.optimizer, stage.steps)(updates_done(state.optimizer)), one),
        # share of positions that are padding
        "padding": (jnp.mean(batch.segment_ids == 0, dtype=jnp.float32), one),
    }
    return TrainState(state.step + 1, params, moments), metrics


def make_train_step(
    stage: StageConfig,
    student: ModelConfig,
    teacher: ModelConfig | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trained: dict,
    frozen: Frozen,
) -> tuple[Callable, TrainState, Frozen]:
    """Jits `train_step` for one stage on one mesh; the first call compiles it.

    Args:
      stage: Configuration of the stage.
      student: Configuration of the student.
      teacher: Configuration of the teacher; None if the objective needs none.
      optimizer: From `make_optimizer`.
      mesh: From `sharding.make_mesh`.
      trained: Name -> array or ShapeDtypeStruct, the trained part of the student.
      frozen: The same for the frozen part of the student, and the teacher.

    Returns:
      step: (state, frozen, batch) -> (state, metrics); it donates the state.
      A TrainState with the shardings of the state.
      A Frozen with the shardings of the frozen parts.

    Raises:
      ConfigError: If rows do not divide over the mesh, or if a router is trained that would learn
        nothing.
    """
    if student.decoder.moe and any(".moe.router." in name for name in trained):
        student.decoder.moe.require_router_that_learns()
    sharding.check_rows(mesh, stage.rows, stage.accumulation)
    student_axes = llava.axes(student)
    trained_shardings = sharding.parameter_shardings(mesh, trained, student_axes)
    state = state_shardings(optimizer, trained, trained_shardings, sharding.replicated(mesh))
    teacher_axes = llava.axes(teacher) if teacher else {}
    of_teacher: dict = sharding.parameter_shardings(mesh, frozen.teacher, teacher_axes)
    if stage.int8_teacher:
        of_teacher |= {
            name: Int8(s, scales_sharding(name, s))
            for name, s in of_teacher.items()
            if may_be_int8(name)
        }
    of_student = sharding.parameter_shardings(mesh, frozen.student, student_axes)
    frozen_shardings = Frozen(of_student, of_teacher)
    step = jax.jit(
        functools.partial(train_step, stage, student, teacher, optimizer),
        donate_argnums=0,
        in_shardings=(state, frozen_shardings, sharding.row_sharding(mesh)),
        out_shardings=(state, sharding.replicated(mesh)),
    )
    return step, state, frozen_shardings
