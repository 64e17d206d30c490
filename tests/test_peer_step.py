"""Our train step computes what the PyTorch peer computes: loss terms and gradient norms.

The peer (`benchmarks/peer`) is transformers' CLIP and Qwen2 with DeepSpeed's mixture of experts and
the authors' losses. `tests/peer_step/` holds what it wrote, in the environment of `make compare`:

    .venv-peer/bin/python -m benchmarks.peer --preset test --work mimic --dump tests/peer_step
    .venv-peer/bin/python -m benchmarks.peer --preset test --work preference --dump tests/peer_step

The mimic step has experts of limited capacity, which drop tokens. A preference step is compared
without balance loss and drops: its two answers are routed apart there, and together here.
"""

import dataclasses
import functools
import pathlib
import re
import subprocess

import jax
import numpy as np
import pytest

from benchmarks import models
from benchmarks.sizes import PRESETS, Samples
from mod_jax.config import MoEConfig
from mod_jax.interop import names
from mod_jax.models.vision import without_tower
from mod_jax.training.state import Frozen, split_trained
from mod_jax.training.step import gradients

ROOT = pathlib.Path(__file__).parents[1]
WRITTEN = ROOT / "tests" / "peer_step"
PEER_PYTHON = ROOT / ".venv-peer" / "bin" / "python"
SIZES = PRESETS["test"]
CAPACITY = {"mimic": 1.0, "preference": None}
RTOL = 2e-5  # float32, summed in another order
# The peer's names -> those of `names.llava_entries`.
SPELLINGS = (
    (r"^vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^adaptor\.0\.", "multi_modal_projector.linear_1."),
    (r"^adaptor\.2\.", "multi_modal_projector.linear_2."),
    (r"\.moe\.deepspeed_moe\.gate\.wg\.", ".gate."),
    (r"\.moe\.deepspeed_moe\.experts\.deepspeed_experts\.", ".experts."),
)


def respelled(name: str) -> str:
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def parameters(file: pathlib.Path, config) -> dict[str, np.ndarray]:
    """The weights of a model that the peer wrote, as ours."""
    with np.load(file) as arrays:
        theirs = {respelled(name): array for name, array in arrays.items()}
    stacks = names.to_ours(names.llava_entries(config), names.canonical(theirs, "llava"))
    return {name: np.asarray(stack) for name, stack in stacks.items()}


def step(folder: pathlib.Path, work: str):
    """(metrics, norm of each gradient under the peer's names) of our step, and the peer's file."""
    with np.load(folder / f"{work}.npz") as arrays:
        theirs = dict(arrays)
    moe = MoEConfig(capacity_factor=CAPACITY[work])
    student = models.student(SIZES)
    student = dataclasses.replace(student, decoder=dataclasses.replace(student.decoder, moe=moe))
    teacher = models.teacher(SIZES)
    weights = parameters(folder / "student.npz", student)
    others = without_tower(parameters(folder / "teacher.npz", teacher))
    trained, frozen = split_trained(weights, models.TRAINS)
    objective = dataclasses.replace(
        models.OBJECTIVES[work], compat=True, balance_weight=0.01 if work == "mimic" else 0.0
    )
    batch = models.batch(work, Samples(*(theirs[field] for field in Samples._fields)))
    run = jax.jit(functools.partial(gradients, objective, 1, student, teacher))
    read = Frozen({name: weights[name] for name in frozen}, others)
    gradient, metrics = run({name: weights[name] for name in trained}, read, batch)
    entries = [entry for entry in names.llava_entries(student) if entry.ours in trained]
    norms = {
        name: np.linalg.norm(np.float64(gradient[entry.ours][index]))
        for entry in entries
        for index, name in entry.places()
    }
    return {name: total / count for name, (total, count) in metrics.items()}, norms, theirs


def assert_same(folder: pathlib.Path, work: str):
    metrics, norms, theirs = step(folder, work)
    kinds = {key: {} for key in ("loss", "gradient_norm")}
    for key, value in theirs.items():
        kind, _, name = key.partition("/")
        if name:
            kinds[kind][name] = float(value)
    assert "loss" in kinds["loss"] and len(kinds["loss"]) == 4
    for name, value in kinds["loss"].items():
        np.testing.assert_allclose(metrics[name], value, rtol=RTOL, err_msg=name)
    wanted = {respelled(name): value for name, value in kinds["gradient_norm"].items()}
    assert wanted.keys() == norms.keys()
    largest = max(wanted.values())
    for name, value in wanted.items():
        np.testing.assert_allclose(norms[name], value, rtol=RTOL, atol=1e-6 * largest, err_msg=name)


@pytest.mark.parametrize("work", ["mimic", "preference"])
def test_loss_terms_and_gradient_norms_are_the_peers(work):
    assert_same(WRITTEN, work)


@pytest.mark.slow
@pytest.mark.skipif(not PEER_PYTHON.exists(), reason="make compare sets its environment up")
@pytest.mark.parametrize("form", ["authors", "rows"])
@pytest.mark.parametrize("work", ["mimic", "preference"])
def test_a_new_dump_agrees_in_both_forms(tmp_path, work, form):
    command = [PEER_PYTHON, "-m", "benchmarks.peer", "--preset", "test", "--work", work]
    subprocess.run([*command, "--form", form, "--dump", tmp_path], check=True, cwd=ROOT)
    assert_same(tmp_path, work)
