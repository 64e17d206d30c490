"""A teacher in int8 is the teacher of the rounded weights, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import DENSE, SPARSE, TEACHER, chats, params_of

from mod_jax.config import DataConfig, MeshConfig, ObjectiveConfig, SourceConfig, StageConfig
from mod_jax.models import llava
from mod_jax.models.vision import without_tower
from mod_jax.sharding import make_mesh, parameter_shardings
from mod_jax.training import loop
from mod_jax.training.int8 import Int8, quantised, scales_sharding
from mod_jax.training.state import Frozen, may_be_int8

# Name -> the dimension of one layer, or of one expert, whose numbers share a scale.
SHARED = {
    "layers.attention.query.w_dnh": 1,
    "layers.attention.out.w_nhd": 1,
    "layers.mlp.down.w_fd": 1,
    "layers.moe.experts.gate.w_edf": 2,
    "layers.moe.experts.down.w_efd": 2,
}


@pytest.mark.parametrize("name", SHARED)
def test_numbers_of_the_first_dimension_share_a_scale_and_are_rounded(name):
    axis = SHARED[name]
    shape = (2, 3, 4, 5)[: 1 + len(name.rpartition("_")[2])]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x[..., 0] = 0  # a scale of nothing
    found = quantised(name, x)
    highest = np.abs(x.astype(np.float64)).max(axis=axis, keepdims=True)
    assert (found.values.dtype, found.scales.dtype) == (np.int8, np.float32)
    assert found.scales.shape == highest.shape
    error = np.abs(np.asarray(found.astype(jnp.float32), np.float64) - x)
    assert (error <= highest / 254 * 1.0001).all()
    assert error.max() > 0
    np.testing.assert_array_equal(found.astype(jnp.float32)[..., 0], 0)


def test_what_is_rounded_are_the_weights_of_the_layers():
    rounded = {name for name in params_of(SPARSE) if may_be_int8(name)}
    assert {name.rpartition(".")[2] for name in rounded} == {
        *("w_dnh", "w_dkh", "w_nhd", "w_df", "w_fd", "w_edf", "w_efd")
    }
    assert not any("router" in name or "vision" in name for name in rounded)


def teacher_in_int8() -> tuple[dict, dict]:
    """Parameters of the teacher without its tower: in int8, and the same numbers in float32."""
    params = without_tower(params_of(TEACHER, 1))
    held = loop.in_use(Frozen({}, params), "float32", int8_teacher=True).teacher
    rounded = {
        name: x.astype(jnp.float32) if isinstance(x, Int8) else x for name, x in held.items()
    }
    return held, rounded


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(config, params, batch, features):
    model = llava.bind(config, params, with_tower=False)
    return model(batch, features)[0]


def test_the_teacher_is_that_of_the_rounded_weights_on_any_mesh():
    held, rounded = teacher_in_int8()
    batch = chats()
    shape = jax.eval_shape(llava.bind(DENSE, params_of(DENSE)).features, batch.images)
    features = np.random.default_rng(0).normal(size=shape.shape).astype(np.float32)
    wanted = hidden_states(TEACHER, rounded, batch, features)
    found = hidden_states(TEACHER, held, batch, features)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = parameter_shardings(mesh, rounded, llava.axes(TEACHER))
    placed = {
        name: jax.device_put(x, Int8(s, scales_sharding(name, s)) if may_be_int8(name) else s)
        for (name, x), s in zip(held.items(), shardings.values(), strict=True)
    }
    with jax.set_mesh(mesh):
        found = hidden_states(TEACHER, placed, batch, features)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_stage_takes_a_teacher_in_int8():
    """Its shapes and shardings go through the step; its weights take a fourth of float32."""
    student = params_of(DENSE)
    names = [name for name in student if name.startswith("adaptor.")]
    trained = {name: student.pop(name) for name in names}
    teacher = without_tower(params_of(TEACHER, 1))
    data = DataConfig((SourceConfig(),))
    stage = StageConfig(
        ("adaptor.*",), ObjectiveConfig("mimic"), data, steps=1, rows=8, int8_teacher=True
    )
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=2))
    batch = chats()
    frozen = Frozen(student, teacher)
    with jax.set_mesh(mesh):
        program = loop.make_program(stage, DENSE, TEACHER, mesh, trained, frozen)
        loop.trace(program, trained, frozen, batch)
        held = jax.device_put(
            loop.in_use(frozen, program.dtype, program.int8_teacher), program.frozen
        )
    name = "language_model.layers.mlp.gate.w_df"
    assert held.teacher[name].values.nbytes * 4 == teacher[name].nbytes
    assert held.student[name].dtype == np.float32
