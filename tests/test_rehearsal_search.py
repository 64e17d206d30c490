"""Which meshes, micro-batches and remat policies are tried, and what a winner sets."""

import collections
import dataclasses
import math

import jax
import pytest
from small import SPARSE, TEACHER, chats

from mod_jax.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelSource,
    ObjectiveConfig,
    RecipeConfig,
    SourceConfig,
    StageConfig,
)
from mod_jax.models import llava
from mod_jax.models.vision import without_tower
from mod_jax.rehearsal.candidates import A_MESH, Candidate, candidates
from mod_jax.rehearsal.hardware import hardware
from mod_jax.rehearsal.recipe import Planned
from mod_jax.rehearsal.search import heaviest, overrides, planned_with, with_candidate

V5E = hardware("v5e-16")


def plan_of(rows=16, trains=("language_model.*",), teacher=TEACHER):
    data = DataConfig((SourceConfig(),))
    kind = "mimic" if teacher else "next_token"
    stage = StageConfig(trains, ObjectiveConfig(kind), data, steps=10, rows=rows)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), chats())
    return Planned(stage, SPARSE, teacher, batch)


def sizes(mesh):
    return (mesh.data, mesh.fsdp, mesh.expert, mesh.tensor)


def test_candidates_divide_the_stage():
    found = candidates(plan_of(), [], 8, V5E, count=100)
    assert len(found) > 10
    for one in found:
        data, fsdp, expert, tensor = sizes(one.mesh)
        assert data * fsdp * expert * tensor == 8
        assert 4 % expert == 0 and 2 % tensor == 0  # 4 experts, 2 key/value heads
        assert 16 % (data * fsdp * expert * one.accumulation) == 0
    seconds = [one.seconds for one in found]
    assert seconds[0] < 1.1 * min(seconds)
    assert max(collections.Counter(sizes(one.mesh) for one in found).values()) <= A_MESH


def test_other_stages_and_slices_have_to_divide_too():
    found = candidates(plan_of(), [plan_of(rows=4)], 8, V5E, 100, slices=2)
    assert found
    for one in found:
        data, fsdp, expert, _ = sizes(one.mesh)
        assert data % 2 == 0 and 4 % (data * fsdp * expert) == 0


def test_no_candidate_is_an_error():
    with pytest.raises(ConfigError, match=r"rows = 3: expected a mesh of 8 devices that divides"):
        candidates(plan_of(rows=3), [], 8, V5E, 8)


def numbers(shapes):
    return sum(math.prod(x.shape) for x in shapes.values())


def test_the_estimate_of_memory_is_that_of_its_parts():
    """On one device: weights, two moments and a gradient in float32, the rest in bfloat16."""
    shapes = llava.abstract(SPARSE)
    trained = {name: x for name, x in shapes.items() if name.startswith("language_model.")}
    held = 16 * numbers(trained) + 2 * (numbers(shapes) - numbers(trained))
    held += 2 * numbers(without_tower(llava.abstract(TEACHER)))
    (one,) = (c for c in candidates(plan_of(), [], 1, V5E, 1))
    assert sizes(one.mesh) == (1, 1, 1, 1)
    # what is kept for the backward pass: at least the input of each layer
    layers = SPARSE.decoder.num_layers * SPARSE.decoder.hidden_size
    assert held + 16 * 32 * layers * 2 / one.accumulation < one.memory < held * 3


def recipe():
    stages = {
        "adaptor": dataclasses.replace(plan_of(teacher=None).stage, rows=64),
        "mimic": plan_of().stage,
    }
    source = ModelSource(random=SPARSE)
    return RecipeConfig("small", "none", source, stages, ("adaptor", "mimic"), source)


def test_a_winner_sets_mesh_remat_and_micro_batches_of_all_stages():
    winner = Candidate(MeshConfig(1, 2, 2, 2), 2, "dots", 0.0, 0.0)
    found = with_candidate(recipe(), winner, rows=16)
    assert (found.mesh, found.remat) == (winner.mesh, "dots")
    # 16 rows over 4 devices in 2 micro-batches are 2 rows at a time; of 64 rows they are 8
    assert [found.stages[name].accumulation for name in found.order] == [8, 2]
    assert overrides(found) == [
        "--config.mesh.data=1",
        "--config.mesh.fsdp=2",
        "--config.mesh.expert=2",
        "--config.mesh.tensor=2",
        "--config.remat=dots",
        "--config.stages.adaptor.accumulation=8",
        "--config.stages.mimic.accumulation=2",
    ]
    tried = planned_with(plan_of(), winner)
    assert (tried.stage.accumulation, tried.student.remat) == (2, "dots")


def test_the_heaviest_stage_trains_and_reads_most():
    plans = {
        "adaptor": plan_of(trains=("adaptor.*",), teacher=None),
        "mimic": plan_of(),
        "frozen": plan_of(trains=("adaptor.*",)),
    }
    assert heaviest(plans) == "mimic"
