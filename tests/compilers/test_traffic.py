"""What the train step sends on meshes of accelerators, read from the compiled program.

Rows of a batch are split over data, fsdp and expert, so weights are gathered, and gradients are
scattered back in float32. Rows of experts go along `expert`, and nothing else does that grows with
the batch but the hidden states that the loss compares.
"""

import collections

import pytest
from mesh import mesh_of, options_of

from benchmarks import models
from benchmarks.compiled_step import TRAINS, Step, figures, work_of_device
from benchmarks.sizes import Sizes, draw
from mod_jax.config import MeshConfig
from mod_jax.models import llava
from mod_jax.rehearsal.collectives import collectives
from mod_jax.rehearsal.trips import trips
from mod_jax.sharding import row_ways
from mod_jax.training.state import split_trained

MESHES = {
    "h100-8": MeshConfig(data=1, fsdp=4, expert=2),
    "v5e-16": MeshConfig(data=1, fsdp=8, expert=2),
    "v6e-16": MeshConfig(data=1, fsdp=8, expert=2),
}
# 448 numbers of a weight's rows on 8 devices are 56, which is no power of two
SIZES = {"width": 448, "layers": 4, "heads": 7, "kv_heads": 1, "inner": 640, "words": 16896}


@pytest.fixture(scope="module", params=MESHES)
def mesh(request):
    return mesh_of(request.param, MESHES[request.param])


@pytest.fixture(scope="module")
def step(mesh):
    rows = row_ways(mesh)
    sizes = Sizes(*SIZES.values(), 1088, rows, 112, 14, 128, 4, 4, 512)
    student, teacher = (make(sizes, dtype="bfloat16") for make in (models.student, models.teacher))
    return Step(
        models.stage("mimic", rows, TRAINS), student, teacher, models.batch("mimic", draw(sizes))
    )


@pytest.fixture(scope="module")
def program(step, mesh):
    return figures(step, mesh, options_of(mesh))["program"]


@pytest.fixture(scope="module")
def sent(program, step, mesh):
    work = work_of_device(step, mesh)
    return list(collectives(program, mesh.shape, trips(work, program)))


def total(sent, **wanted):
    """Bytes of the collectives whose fields have these values."""
    return sum(x.sent for x in sent if all(getattr(x, key) == v for key, v in wanted.items()))


def test_nothing_large_is_reduced_whole(sent):
    assert total(sent, kind="all-reduce") < 0.02 * total(sent)


def test_gradients_are_scattered_in_float32(sent, step, mesh):
    """Of each weight that trains, once; parts are filled up to whole tiles."""
    shapes = llava.abstract(step.student)
    trained, _ = split_trained(shapes, step.stage.trains)
    dense = sum(shapes[name].size for name in trained if ".experts." not in name)
    experts = sum(shapes[name].size for name in trained if ".experts." in name)
    ways, fsdp = row_ways(mesh), mesh.shape["fsdp"]
    needed = 4 * dense * (ways - 1) / ways
    needed += 4 * experts / mesh.shape["expert"] * (fsdp - 1) / fsdp
    gradients = [x for x in sent if x.module.endswith("gradient")]
    assert 0.95 * needed < total(gradients, kind="reduce-scatter") < 1.6 * needed


def test_pictures_stay_where_they_are(sent):
    """The tower sends weights alone; the adaptor's gradient is scattered too."""
    tower = {x.kind for x in sent if x.module.startswith("vision tower")}
    assert tower == {"all-gather"}


def test_rows_of_experts_go_along_their_axis(sent):
    moved = [x for x in sent if "all-to-all" in x.kind and "experts" in x.module]
    assert moved and {x.axes for x in moved} == {("expert",)}


def test_no_device_has_a_whole_head(program, step):
    words, width = step.student.decoder.vocab_size, step.student.decoder.hidden_size
    for array, instruction in program.arrays():
        assert not {words, width} <= set(array.shape), instruction


def test_no_weight_is_gathered_more_often_than_it_is_needed(sent, step, mesh):
    """For the forward pass and, under remat full, for the backward pass; the teacher's once."""
    by_module = collections.Counter()
    for x in sent:
        if x.kind == "all-gather" and "tower" not in x.module and "loss" not in x.module:
            by_module[x.module.split()[0]] += x.sent
    for model, config, times in (("student", step.student, 2), ("teacher", step.teacher, 1)):
        layers = {n: s for n, s in llava.abstract(config).items() if ".layers." in n and ".w_" in n}
        dense = sum(s.size for n, s in layers.items() if "language" in n and ".moe." not in n)
        experts = sum(s.size for n, s in layers.items() if ".experts." in n)
        ways, fsdp = row_ways(mesh), mesh.shape["fsdp"]
        once = 2 * dense * (ways - 1) / ways
        once += 2 * experts / mesh.shape["expert"] * (fsdp - 1) / fsdp
        assert by_module[model] < 1.35 * times * once
