"""The one train step: every stage, every objective, any mesh.

Equivalent to: the loss of the whole global batch at once, differentiated with respect to the trained parameters, one
AdamW update. Micro-batches only bound the memory: each contributes its share of the global batch's loss, because the
sums that losses are divided by (`objectives.Totals`) are taken over the whole batch before the first of them.
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
from mod_jax.training.state import Frozen, TrainState, make_schedule, state_shardings


def views(
    student: ModelConfig, teacher: ModelConfig | None, params: dict, frozen: Frozen, batch: Batch
):
    """Runs tower (once), student and teacher.

    Returns:
      (student View, teacher View or None, MoEAux of the student).
    """
    weights = {**params, **frozen.student}
    model = llava.bind(student, weights)
    features = model.features(batch.images)
    hidden, aux = model(batch, features)
    seen = objectives.View(hidden, llava.head(student, weights))
    if teacher is None:
        return seen, None, aux
    tower = {name: weight for name, weight in weights.items() if name.startswith("vision_tower.")}
    taught = {**frozen.teacher, **tower}
    reference, _ = llava.bind(teacher, taught)(batch, features.astype(teacher.dtype))
    return seen, jax.lax.stop_gradient(objectives.View(reference, llava.head(teacher, taught))), aux


def micro_batches(batch: Batch, count: int) -> Batch:
    """Splits rows into `count` micro-batches [count, rows / count, ...], row i into i % count: no row leaves its device."""
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
):
    """Gradient of the global batch's loss, and its metrics.

    Returns:
      (gradient: name -> f32 array, metrics: name -> (sum, count)).
    """
    totals = objectives.totals(objective, batch)

    def loss(params, micro, pair_means):
        seen, reference, aux = views(student, teacher, params, frozen, micro)
        return objectives.loss(objective, micro, seen, reference, aux, totals, pair_means)

    differentiate = jax.value_and_grad(loss, has_aux=True)
    if accumulation == 1:
        (value, metrics), gradient = differentiate(params, batch, None)
        return gradient, {**metrics, "loss": (value, jnp.ones(()))}

    micros = micro_batches(batch, accumulation)
    pair_means = None
    if (
        objective.kind == "preference"
        and objective.preference == "kto_pair"
        and not objective.compat
    ):
        # KTO's KL is a mean over the global batch, needed before the first gradient: one forward pass more.
        def sums(carry, micro):
            seen, reference, _ = views(student, teacher, params, frozen, micro)
            chosen, rejected, valid = objectives.pair_ratios(micro, seen, reference)
            return (carry[0] + jnp.sum(chosen * valid), carry[1] + jnp.sum(rejected * valid)), None

        (chosen, rejected), _ = jax.lax.scan(sums, (jnp.zeros(()), jnp.zeros(())), micros)
        pair_means = (
            chosen / jnp.maximum(totals.pairs, 1),
            rejected / jnp.maximum(totals.pairs, 1),
        )

    def contribution(micro):
        (value, metrics), gradient = differentiate(params, micro, pair_means)
        return gradient, value, metrics

    shapes = jax.eval_shape(contribution, jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (gradient, value, metrics), _ = jax.lax.scan(
        lambda carry, micro: (jax.tree.map(jnp.add, carry, contribution(micro)), None),
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
):
    """One update (pure; see make_train_step for the compiled form).

    Returns:
      (state, metrics: name -> (sum f32[], count f32[])).
    """
    gradient, metrics = gradients(
        stage.objective, stage.accumulation, student, teacher, state.params, frozen, batch
    )
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    one = jnp.ones(())
    metrics |= {
        "gradient_norm": (optax.tree.norm(gradient), one),
        "lr": (make_schedule(stage.optimizer, stage.steps)(state.step), one),
    }
    metrics["padding"] = (
        jnp.mean(batch.segment_ids == 0, dtype=jnp.float32),
        one,
    )  # share of positions
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), moments), metrics


def make_train_step(
    stage: StageConfig,
    student: ModelConfig,
    teacher: ModelConfig | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trained: dict,
    frozen: Frozen,
) -> tuple[Callable, TrainState, Frozen]:
    """Compiles (lazily) `train_step` for one stage on one mesh.

    Args:
      trained: name -> array or ShapeDtypeStruct of the trained parameters.
      frozen: the same for the frozen ones.
    Returns:
      (step(state, frozen, batch) -> (state, metrics) with the state donated, shardings of the state, shardings of the frozen part).
    Raises:
      ConfigError: for sizes that do not divide over the mesh.
    """
    sharding.check_rows(mesh, stage.rows, stage.accumulation)
    student_axes = llava.axes(student)
    trained_shardings = sharding.parameter_shardings(mesh, trained, student_axes)
    state = state_shardings(optimizer, trained, trained_shardings, sharding.replicated(mesh))
    read = Frozen(
        sharding.parameter_shardings(mesh, frozen.student, student_axes),
        sharding.parameter_shardings(mesh, frozen.teacher, llava.axes(teacher)) if teacher else {},
    )
    step = jax.jit(
        functools.partial(train_step, stage, student, teacher, optimizer),
        donate_argnums=0,
        in_shardings=(state, read, sharding.row_sharding(mesh)),
        out_shardings=(state, sharding.replicated(mesh)),
    )
    return step, state, read
