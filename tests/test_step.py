"""The train step: the same on every mesh and with any number of micro-batches.

It changes the parameters that train and no others.
"""

import dataclasses
import fnmatch
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import DENSE, SPARSE, TEACHER, chats, pairs, params_of

from mod_jax.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SourceConfig,
    StageConfig,
)
from mod_jax.models import llava
from mod_jax.models.vision import VisionTower
from mod_jax.sharding import check_rows, make_mesh, parameter_shardings
from mod_jax.training import loop, step
from mod_jax.training.loop import to_devices
from mod_jax.training.metrics import mean as metrics_mean
from mod_jax.training.state import Frozen, make_optimizer, make_schedule, new_state, split_trained

LANGUAGE = ("language_model.*", "adaptor.*")
EXPERTS = ("language_model.layers.mlp.*", "language_model.layers.moe.*", "adaptor.*")
CASES = {
    "dense mimic": (DENSE, LANGUAGE, ObjectiveConfig("mimic")),
    "sparse mimic": (
        SPARSE,
        EXPERTS,
        ObjectiveConfig("mimic", next_token_weight=1.0, balance_weight=0.1),
    ),
    "dense preference": (DENSE, LANGUAGE, ObjectiveConfig("preference", preference="sigmoid")),
    "sparse preference": (SPARSE, EXPERTS, ObjectiveConfig("preference", preference="kto_pair")),
}
MESHES = {
    "8 fsdp": MeshConfig(1, 8, 1, 1),
    "2 fsdp x 4 expert": MeshConfig(1, 2, 4, 1),
    "2 data x 2 expert x 2 tensor": MeshConfig(2, 1, 2, 2),
    "8 tensor": MeshConfig(1, 1, 1, 8),  # more than there are heads: these are whole everywhere
}
RTOL = 1e-5  # of a tensor's largest absolute value
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.01)


def make_stage(trains, objective, **options) -> StageConfig:
    return StageConfig(
        trains, objective, DataConfig((SourceConfig(),)), steps=100, optimizer=OPTIMIZER, **options
    )


def parts(case: str):
    """(stage, student, teacher or None, trained, Frozen, batch) of a case."""
    student, trains, objective = CASES[case]
    teacher = TEACHER if objective.needs_teacher else None
    params = params_of(student)
    names_trained, names_frozen = split_trained(params, trains)
    trained = {name: params[name] for name in names_trained}
    frozen = {name: params[name] for name in names_frozen}
    teacher_params = params_of(TEACHER, 1) if teacher else {}
    teacher_params = {
        name: array
        for name, array in teacher_params.items()
        if not name.startswith("vision_tower.")  # the student's is used
    }
    batch = pairs() if objective.kind == "preference" else chats()
    stage = make_stage(trains, objective)
    return stage, student, teacher, trained, Frozen(frozen, teacher_params), batch


@functools.cache
def after_one_step(case: str, mesh_name: str):
    """(state, metrics, frozen) after one step, as numpy; the mesh "1" is one of the devices."""
    if mesh_name == "1":
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    else:
        mesh = make_mesh(MESHES[mesh_name])
    stage, student, teacher, trained, frozen, batch = parts(case)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    with jax.set_mesh(mesh):
        run, state_shardings, frozen_shardings = step.make_train_step(
            stage, student, teacher, optimizer, mesh, trained, frozen
        )
        state = jax.device_put(
            new_state(jax.tree.map(np.copy, trained), optimizer), state_shardings
        )
        placed = jax.device_put(frozen, frozen_shardings)
        state, metrics = run(state, placed, to_devices(batch, mesh))
    return jax.tree.map(np.asarray, (state, metrics, placed))


def first_moments(state) -> dict:
    """Adam's first moments; after one step they are 0.1 times the clipped gradient."""
    return optax.tree_utils.tree_get(state.optimizer, "mu")


def assert_near(found: dict, wanted: dict, rtol=RTOL):
    """Each array differs by at most rtol of its largest absolute value."""
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(
            found[name], array, rtol=0, atol=rtol * np.abs(array).max(), err_msg=name
        )


@pytest.mark.parametrize(
    ("case", "mesh"),
    [*itertools.product(CASES, list(MESHES)[:3]), ("sparse mimic", "8 tensor")],
)
def test_every_mesh_takes_the_step_of_one_device(case, mesh):
    state, metrics, _ = after_one_step(case, mesh)
    alone, wanted, _ = after_one_step(case, "1")
    assert metrics.keys() == wanted.keys()
    for name, pair in wanted.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-5, atol=1e-5, err_msg=name)
    gradient = first_moments(alone)
    assert all(np.abs(array).max() > 0 for array in gradient.values())
    assert_near(first_moments(state), gradient)
    # Adam's first update is lr * sign(gradient). A gradient that is below the tolerance of the
    # gradients may have either sign; the others determine the update.
    lr = float(wanted["lr"][0])
    for name, array in alone.params.items():
        clear = np.abs(gradient[name]) > 10 * RTOL * np.abs(gradient[name]).max()
        np.testing.assert_allclose(
            state.params[name][clear], array[clear], rtol=1e-6, atol=1e-3 * lr, err_msg=name
        )
        np.testing.assert_allclose(state.params[name], array, rtol=0, atol=2.01 * lr, err_msg=name)
    assert state.step == alone.step == 1


@pytest.mark.parametrize("case", CASES)
def test_only_what_trains_changes_and_is_kept(case):
    _, _, _, trained, frozen, _ = parts(case)
    state, _, read = after_one_step(case, "1")
    assert state.params.keys() == first_moments(state).keys() == trained.keys()
    assert not state.params.keys() & frozen.student.keys()
    assert any(name.startswith("vision_tower.") for name in frozen.student)
    assert all((state.params[name] != trained[name]).any() for name in trained)
    jax.tree.map(np.testing.assert_array_equal, read, frozen)


@pytest.mark.parametrize("case", CASES)
def test_the_tower_runs_once(case, monkeypatch):
    """The teacher reads the features of the student's tower."""
    runs = []
    call = VisionTower.__call__

    def counted(self, images):
        runs.append(images.shape)
        return call(self, images)

    monkeypatch.setattr(VisionTower, "__call__", counted)
    stage, student, teacher, trained, frozen, batch = parts(case)
    run = functools.partial(step.gradients, stage.objective, 1, student, teacher)
    jax.eval_shape(run, trained, frozen, batch)
    assert runs == [batch.images.shape]


def test_the_teacher_gets_no_gradient():
    """Not whatever an objective does with its view, nor through the features that both read.

    So the view is differentiated itself, also in the tower, which makes the features.
    """
    _, student, teacher, trained, frozen, batch = parts("dense mimic")

    def of_views(params, frozen):
        seen, reference, _ = step.views(student, teacher, params, frozen, batch)
        return [
            jnp.sum(jnp.sin(view.hidden)) + jnp.sum(view.head_w_vd) for view in (seen, reference)
        ]

    _, pull = jax.vjp(jax.jit(of_views), trained, frozen)
    to_student, to_frozen = pull([jnp.ones(()), jnp.zeros(())])
    assert any(np.any(g) for g in to_student.values())
    assert np.any(to_frozen.student["vision_tower.patches.w_pd"]), "the features have a gradient"
    from_teacher = pull([jnp.zeros(()), jnp.ones(())])
    assert not any(np.any(g) for g in jax.tree.leaves(from_teacher))


UNEVEN = {
    "next token": ObjectiveConfig(balance_weight=0.0),
    "mimic": ObjectiveConfig("mimic", next_token_weight=0.5, balance_weight=0.0),
    "preference": ObjectiveConfig("preference", preference="kto_pair", balance_weight=0.0),
}


@functools.cache
def gradients_in(case: str, accumulation: int):
    """(gradient, metrics) of the global batch in `accumulation` micro-batches; a sparse student."""
    model_case = "sparse preference" if case == "preference" else "sparse mimic"
    _, student, teacher, trained, frozen, batch = parts(model_case)
    objective = UNEVEN[case]
    if not objective.needs_teacher:
        teacher, frozen = None, Frozen(frozen.student, {})
    run = functools.partial(step.gradients, objective, accumulation, student, teacher)
    return jax.jit(run)(trained, frozen, batch)


@pytest.mark.parametrize(
    "case, accumulation", [("next token", 4), ("mimic", 4), ("preference", 2), ("preference", 4)]
)
def test_micro_batches_of_uneven_answers_add_up_to_the_whole(case, accumulation):
    """Without the balance loss, whose means are deliberately taken over a micro-batch."""
    gradient, metrics = gradients_in(case, accumulation)
    whole, wanted = gradients_in(case, 1)
    assert_near(gradient, whole)
    losses = {"loss", "next_token", "kl", "preference", "reward_margin", "samples_without_target"}
    for name in losses & wanted.keys():
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_micro_batches_of_the_test_above_are_uneven_and_feel_ktos_kl():
    """Otherwise the test above would also pass for means of means."""
    micros = step.micro_batches(chats(), 4)
    assert len(set(np.asarray(micros.loss_weights).sum((1, 2)))) > 1
    _, metrics = gradients_in("preference", 1)
    assert max(float(metrics["reward_chosen"][0]), float(metrics["reward_rejected"][0])) > 0


def run_steps(stage, parts_of_steps):
    """(state, metrics of each step) after steps with these (trained, frozen, batch)."""
    student, teacher = DENSE, TEACHER
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    run = jax.jit(functools.partial(step.train_step, stage, student, teacher, optimizer))
    state = new_state(parts_of_steps[0][0], optimizer)
    metrics = []
    for _, frozen, batch in parts_of_steps:
        state, values = run(state, frozen, batch)
        metrics.append(jax.device_get(values))
    return state, metrics


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_that_is_not_finite_leaves_no_trace(accumulation):
    """Two good steps with a bad one between them equal two good steps, bit for bit."""
    stage, _, _, trained, frozen, batch = parts("dense mimic")
    stage = dataclasses.replace(stage, accumulation=accumulation)
    name = "language_model.norm.scale_d"
    broken = Frozen(frozen.student, {**frozen.teacher, name: frozen.teacher[name] * np.nan})
    good, bad = (trained, frozen, batch), (trained, broken, batch)
    state, metrics = run_steps(stage, [good, bad, good])
    wanted, wanted_metrics = run_steps(stage, [good, good])
    assert (int(state.step), int(wanted.step)) == (3, 2), "a step counts batches"
    jax.tree.map(np.testing.assert_array_equal, state.params, wanted.params)
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, wanted.optimizer)
    assert [float(m["nonfinite"][0]) for m in metrics] == [0, 1, 0]
    # its values enter no mean, and the rate that is reported is the one that is used
    assert all(metrics[1][name] == (0, 0) for name in ("loss", "kl", "gradient_norm"))
    jax.tree.map(np.testing.assert_array_equal, metrics[2], wanted_metrics[1])
    assert metrics_mean(metrics)["nonfinite"] == pytest.approx(1 / 3)
    assert metrics_mean(metrics)["loss"] == metrics_mean(wanted_metrics)["loss"]


@pytest.mark.parametrize(
    ("loss", "gradient", "skipped"),
    [
        (1.0, 2.0, False),
        (np.nan, 2.0, True),
        (np.inf, 2.0, True),
        (1.0, np.nan, True),
        (1.0, -np.inf, True),
        (1.0, 1e30, True),  # finite, but its square is not: no norm, no clipping
    ],
)
def test_loss_and_gradient_must_both_be_finite(loss, gradient, skipped, monkeypatch):
    stage = make_stage(LANGUAGE, ObjectiveConfig("mimic"))
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    given = {"w": jnp.array([1.0, gradient]), "v": jnp.ones(3)}
    metrics = {"loss": (jnp.float32(loss), jnp.float32(1))}
    monkeypatch.setattr(step, "gradients", lambda *_: (given, metrics))
    state = new_state(jax.tree.map(jnp.ones_like, given), optimizer)
    after, found = step.train_step(stage, DENSE, TEACHER, optimizer, state, None, chats())
    assert float(found["nonfinite"][0]) == skipped
    same = jax.tree.map(lambda a, b: bool((a == b).all()), after.params, state.params)
    assert set(same.values()) == {skipped}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, found)))


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 100.0])
def test_metrics_of_a_step_are_those_of_its_gradient_and_batch(clip_norm, monkeypatch):
    """`gradient_norm` is that before clipping, of the gradient and not of the update."""
    stage = make_stage(LANGUAGE, ObjectiveConfig("mimic"))
    config = OptimizerConfig(lr=1e-2, warmup_share=0.03, clip_norm=clip_norm)
    stage = dataclasses.replace(stage, optimizer=config)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    given = {"a.w_df": np.array([[3.0, 1.0]], np.float32), "a.b_f": np.full(3, -2.0, np.float32)}
    metrics = {"loss": (jnp.float32(7), jnp.float32(1))}
    monkeypatch.setattr(step, "gradients", lambda *_: (given, metrics))
    state = new_state(jax.tree.map(jnp.ones_like, given), optimizer)
    batch = chats()
    for number in range(2):
        state, found = step.train_step(stage, DENSE, TEACHER, optimizer, state, None, batch)
        wanted = {
            "loss": 7.0,
            "nonfinite": 0.0,
            "gradient_norm": np.sqrt(9 + 1 + 3 * 4),
            "lr": 1e-2 * (number + 1) / 3,  # three steps of warm-up
            "padding": np.mean(np.asarray(batch.segment_ids) == 0),
        }
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], (value, 1), rtol=1e-6, err_msg=name)


def test_micro_batches_take_rows_round_robin():
    batch = chats()
    micros = step.micro_batches(batch, 2)
    for field in dataclasses.fields(batch):
        np.testing.assert_array_equal(
            getattr(micros, field.name)[1], getattr(batch, field.name)[1::2]
        )


def test_no_gradient_passes_through_bfloat16():
    """Under bfloat16 activations the gradient of every parameter is summed in float32.

    One that was summed in bfloat16, over positions or devices, would have nothing but numbers that
    bfloat16 holds.
    """
    stage, student, teacher, _, frozen, batch = parts("sparse mimic")
    decoder = dataclasses.replace(student.decoder, tie_embeddings=False)
    student = dataclasses.replace(student, decoder=decoder, dtype="bfloat16")
    teacher = dataclasses.replace(teacher, dtype="bfloat16")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    params = params_of(student)
    run = functools.partial(step.gradients, stage.objective, 1, student, teacher)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(mesh, params, llava.axes(student)))
        gradient, _ = jax.jit(run)(placed, Frozen({}, frozen.teacher), to_devices(batch, mesh))
    rounded = {
        name
        for name, array in gradient.items()
        if np.all(array.astype(jnp.bfloat16).astype(jnp.float32) == array)
    }
    # The norm after the tower's last layer is not run: features are those of the layer before.
    assert rounded == {f"vision_tower.post_norm.{leaf}" for leaf in ("scale_d", "bias_d")}


def test_frozen_weights_in_the_dtype_of_their_use_change_no_number():
    """Loss, metrics and gradients are those of float32 weights, which the step would cast itself.

    What the step uses in float32 is not cast: norms, routers, and biases.
    """
    stage, student, teacher, trained, frozen, batch = parts("sparse mimic")
    student = dataclasses.replace(student, dtype="bfloat16")
    teacher = dataclasses.replace(teacher, dtype="bfloat16")
    in_use = loop.in_use(frozen, "bfloat16")
    run = jax.jit(functools.partial(step.gradients, stage.objective, 1, student, teacher))
    wanted = run(trained, frozen, batch)
    jax.tree.map(np.testing.assert_array_equal, run(trained, in_use, batch), wanted)
    for params in (in_use.student, in_use.teacher):
        for name, array in params.items():
            is_weight = ".w_" in name and ".router." not in name
            assert array.dtype == (jnp.bfloat16 if is_weight else jnp.float32), name


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"language_model\.layers\.moe\.\*.*language_model\.layers\.mlp\.gate\.w_df",
    ):
        split_trained(params_of(DENSE), EXPERTS)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(
        ConfigError, match=r"rows / accumulation = 6.*multiple of data x fsdp x expert = 4"
    ):
        check_rows(make_mesh(MESHES["2 data x 2 expert x 2 tensor"]), 12, 2)
    check_rows(make_mesh(MESHES["2 data x 2 expert x 2 tensor"]), 12, 3)


def test_a_router_that_would_learn_nothing_is_not_trained():
    """An imported student may have one expert per token; it can be trained around its router."""
    stage, student, teacher, trained, frozen, _ = parts("sparse mimic")
    moe = dataclasses.replace(student.decoder.moe, experts_per_token=1)
    decoder = dataclasses.replace(student.decoder, moe=moe)
    student = dataclasses.replace(student, decoder=decoder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(OPTIMIZER, 1)
    with pytest.raises(ConfigError, match="experts_per_token = 1: expected at least 2"):
        step.make_train_step(stage, student, teacher, optimizer, mesh, trained, frozen)
    router = "language_model.layers.moe.router.w_de"
    others = {name: value for name, value in trained.items() if name != router}
    frozen = Frozen({**frozen.student, router: trained[router]}, frozen.teacher)
    step.make_train_step(stage, student, teacher, optimizer, mesh, others, frozen)


def test_the_schedule_warms_up_linearly_and_falls_as_a_cosine():
    """The first of the 3 steps of warm-up has a third of the rate; the last step is nearly 0."""
    schedule = make_schedule(OptimizerConfig(lr=0.2, warmup_share=0.03), 100)
    steps = np.arange(100)
    wanted = np.where(
        steps < 3, 0.2 * (steps + 1) / 3, 0.1 * (1 + np.cos(np.pi * (steps - 3) / 97))
    )
    np.testing.assert_allclose(jax.vmap(schedule)(steps), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [0.5, 0.0])
def test_the_optimizer_is_adamw_on_the_clipped_gradient(clip_norm):
    config = OptimizerConfig(
        lr=0.1, warmup_share=0.5, b1=0.9, b2=0.98, weight_decay=0.1, clip_norm=clip_norm
    )
    optimizer = make_optimizer(config, 4)
    schedule = make_schedule(config, 4)
    rng = np.random.default_rng(0)
    p = rng.normal(size=5)
    name = "language_model.head.w_vd"
    params = {name: jnp.asarray(p, jnp.float32)}
    state = optimizer.init(params)
    m, v = 0, 0
    for t, size in enumerate([3.0, 0.1, 1.0], 1):
        g = rng.normal(size=5) * size
        updates, state = optimizer.update({name: jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        g = g * min(1, clip_norm / np.linalg.norm(g)) if clip_norm else g
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
        direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + 1e-8)
        p = p - float(schedule(t - 1)) * (direction + 0.1 * p)
        np.testing.assert_allclose(params[name], p, rtol=1e-5, atol=1e-6)


def test_weight_decay_reaches_the_weights_of_matrix_products():
    """Without a gradient, a step multiplies them by 1 - lr * weight_decay, and nothing else."""
    optimizer = make_optimizer(OptimizerConfig(lr=0.5, weight_decay=0.1, warmup_share=0.0), 4)
    decoder = dataclasses.replace(
        SPARSE.decoder, qk_norm=True, tie_embeddings=False, moe=MoEConfig(residual=True)
    )
    siglip = dataclasses.replace(SPARSE.vision, family="siglip")
    params = params_of(dataclasses.replace(SPARSE, decoder=decoder))
    params |= params_of(dataclasses.replace(SPARSE, vision=siglip, decoder=decoder))
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(params), params)
    decayed = {name for name, update in updates.items() if np.any(update)}
    for name in decayed:
        np.testing.assert_allclose(updates[name], -0.5 * 0.1 * params[name], rtol=1e-6)
    for pattern in ("*scale_?", "*.bias_d", "*.b_*", "*class_embedding_d", "*.positions.w_td"):
        assert fnmatch.filter(params, pattern) and not fnmatch.filter(decayed, pattern)
    for pattern in ("*.router.w_de", "*.mix.w_d2"):
        assert fnmatch.filter(params, pattern) and not fnmatch.filter(decayed, pattern)
    for part in ("query", "key", "value", "out", "gate", "up", "down", "linear_1", "linear_2"):
        weights = fnmatch.filter(params, f"*.{part}.w_*")
        assert weights and set(weights) <= decayed
    assert {f"language_model.{x}.w_vd" for x in ("embedding", "head")} <= decayed
    assert "vision_tower.patches.w_pd" in decayed


def test_the_optimizers_state_is_that_of_optax_adamw():
    """So checkpoints do not depend on how the decay is written."""
    params = {"language_model.head.w_vd": jnp.ones(3), "language_model.norm.scale_d": jnp.ones(3)}
    config = OptimizerConfig(clip_norm=0.0)
    ours = make_optimizer(config, 4).init(params)
    theirs = optax.adamw(make_schedule(config, 4)).init(params)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
