"""Compiled programs name the parts of a step, so that profiles do too."""

import re

import jax
import numpy as np
import pytest
from small import SPARSE, TEACHER, chats, pairs, params_of

from mod_jax import objectives
from mod_jax.config import (
    DataConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SourceConfig,
    StageConfig,
)
from mod_jax.models.moe import MoEAux
from mod_jax.sharding import make_mesh
from mod_jax.training.state import Frozen, make_optimizer, new_state, split_trained
from mod_jax.training.step import make_train_step

SCOPES = [
    "vision_tower/patch_embedding",
    "vision_tower/attention",
    "vision_tower/mlp",
    "student/embedding",
    "student/adaptor",
    "student/dense_layer/attention",
    "student/dense_layer/mlp",
    "student/sparse_layer/attention",
    "student/sparse_layer/moe/router",
    "student/sparse_layer/moe/experts/gather_weights",
    "student/sparse_layer/moe/experts/exchange",
    "student/sparse_layer/moe/experts/swiglu",
    "student/sparse_layer/moe/experts/combine",
    "student/sparse_layer/moe/balance",
    "student/final_norm",
    "teacher/embedding",
    "teacher/adaptor",
    "teacher/dense_layer/attention",
    "teacher/dense_layer/mlp",
    "mimic/gather_head",
    "mimic/head",
    "mimic/scatter_head_gradient",  # made with the loss
    "balance",
    "optimizer",
]


@pytest.fixture(scope="module")
def op_names():
    """Names of all operations of a compiled step of a sparse student on four devices."""
    objective = ObjectiveConfig("mimic", next_token_weight=1.0)
    stage = StageConfig(("*",), objective, DataConfig((SourceConfig(),)), steps=1)
    params = params_of(SPARSE)
    trained, frozen = split_trained(params, ("language_model.*", "adaptor.*"))
    trained = {name: params[name] for name in trained}
    teacher = {n: p for n, p in params_of(TEACHER).items() if not n.startswith("vision_tower.")}
    read = Frozen({name: params[name] for name in frozen}, teacher)
    optimizer = make_optimizer(OptimizerConfig(), stage.steps)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2), jax.devices()[:4])
    # By default the compilation cache ignores names, and may return a program with other ones.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    with jax.set_mesh(mesh):
        step, _, _ = make_train_step(stage, SPARSE, TEACHER, optimizer, mesh, trained, read)
        state = jax.eval_shape(lambda params: new_state(params, optimizer), trained)
        text = step.lower(state, read, chats()).compile().as_text()
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)
    return set(re.findall(r'op_name="([^"]*)"', text))


def is_in(scopes: str, op_name: str) -> bool:
    """Whether an operation lies in nested scopes, possibly with others between them."""
    found = iter(re.split(r"[/()]+", op_name))
    return all(scope in found for scope in scopes.split("/"))


def test_a_compiled_step_names_its_parts(op_names):
    assert [s for s in SCOPES if not any(is_in(s, name) for name in op_names)] == []


def test_gradients_are_named_after_the_part_they_belong_to(op_names):
    gradients = [name for name in op_names if "transpose(" in name]
    # The backward pass computes the logits again; XLA may merge them with the forward ones.
    trained = [s for s in SCOPES if s.startswith("student")] + ["mimic"]
    assert [s for s in trained if not any(is_in(s, name) for name in gradients)] == []
    assert not any(is_in("teacher", name) for name in gradients)


@pytest.mark.parametrize("kind", ["next_token", "mimic", "preference"])
def test_each_loss_has_a_name(kind):
    config = ObjectiveConfig(kind)
    batch = pairs(1) if kind == "preference" else chats(1)
    head = np.ones((80, 4), np.float32)
    view = objectives.View(np.ones((*batch.tokens.shape, 4), np.float32), head)
    aux = MoEAux(np.ones(1), np.ones(1), np.ones((1, 4)))
    teacher = view if config.needs_teacher else None
    lowered = jax.jit(
        lambda view: objectives.loss(
            config, batch, view, teacher, aux, objectives.totals(config, batch)
        )
    ).lower(view)
    names = re.findall(r'"(jit\([^"]*)"', lowered.as_text(debug_info=True))
    assert any(is_in(kind, name) for name in names)
    assert any(is_in("balance", name) for name in names)
