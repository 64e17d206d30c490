"""Meshes, micro-batches and remat policies that a stage could run with, the most likely first.

An estimate from shapes alone orders them; only the best are worth a compilation. It counts the
weights and moments that a device holds, what the backward pass keeps, the gathers of weights, the
sums of gradients and activations, and the exchange of experts, each as rings send them.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jax.sharding import AbstractMesh

from mod_jax.config import ConfigError, MeshConfig, ModelConfig
from mod_jax.models import llava
from mod_jax.models.vision import without_tower
from mod_jax.rehearsal.hardware import Hardware
from mod_jax.rehearsal.recipe import Planned
from mod_jax.sharding import AXES, ROWS, partition, ways
from mod_jax.training.state import split_trained

REMATS = ("full", "dots", "none")
# Of each token and layer, how often the forward pass of a student's layer runs, and the share of
# what a layer computes that is kept for the backward pass.
FORWARD = {"full": 2.0, "dots": 1.2, "none": 1.0}
KEPT = {"full": 0.0, "dots": 1.0, "none": 2.5}
FLOAT32, HALF = 4, 2  # bytes
FULL = 0.8  # of the memory, as the estimate leaves out what a compiler needs besides
ALIKE = 0.03  # relative difference of estimates below which memory decides
A_MESH = 2  # candidates of one mesh among those that are compiled
GATHERED = (
    "embed",
    "expert_embed",
    "word_embed",
)  # logical axes over whose mesh axes weights are gathered


class Candidate(NamedTuple):
    """What a stage could run with, and an estimate of what it takes.

    Attributes:
      mesh: Size of each axis.
      accumulation: Micro-batches of a step.
      remat: What the student recomputes.
      memory: Estimated bytes of a device.
      seconds: Estimated seconds of a step.
    """

    mesh: MeshConfig
    accumulation: int
    remat: str
    memory: float
    seconds: float


def candidates(
    plan: Planned,
    others: Sequence[Planned],
    devices: int,
    hardware: Hardware,
    count: int,
    slices: int = 1,
) -> list[Candidate]:
    """The most likely candidates of a stage, the best first.

    Args:
      plan: The stage.
      others: Other stages of the recipe, which have to divide over the same mesh.
      devices: Number of devices.
      hardware: What a device can do.
      count: How many are wanted.
      slices: Number of slices, which have to divide the data axis.

    Raises:
      ConfigError: If none divides the stages and fits by the estimate.
    """
    found = [
        candidate
        for sizes in _meshes(devices)
        if sizes["data"] % slices == 0 and all(_divides(one, sizes) for one in (plan, *others))
        for candidate in _of_mesh(plan, sizes, hardware)
    ]
    found.sort(key=lambda one: (round(math.log(one.seconds) / ALIKE), one.memory))
    chosen: list[Candidate] = []
    for one in found:
        alike = sum(one.mesh == other.mesh for other in chosen)
        if len(chosen) < count and alike < A_MESH:
            chosen.append(one)
    if not chosen:
        rows = plan.stage.rows
        raise ConfigError(
            f"rows = {rows}: expected a mesh of {devices} devices that divides the rows and holds "
            "the weights. Choose more rows, or more devices."
        )
    return chosen


def _meshes(devices: int) -> Iterator[dict[str, int]]:
    """All ways to write a number of devices as a product of the axes' sizes."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for sizes in itertools.product(divisors, repeat=len(AXES) - 1):
        rest, left = divmod(devices, math.prod(sizes))
        if not left:
            yield dict(zip(AXES, (rest, *sizes)))


def _divides(plan: Planned, sizes: Mapping[str, int]) -> bool:
    """Whether heads, experts and rows divide over a mesh; heads need not, but should."""
    models = [model for model in (plan.student, plan.teacher) if model]
    experts = plan.student.decoder.moe.num_experts if plan.student.decoder.moe else 1
    if experts % sizes["expert"] or plan.stage.rows % math.prod(sizes[axis] for axis in ROWS):
        return False
    return not any(model.decoder.num_kv_heads % sizes["tensor"] for model in models)


def _abstract(sizes: Mapping[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def _of_mesh(plan: Planned, sizes: Mapping[str, int], hardware: Hardware) -> Iterator[Candidate]:
    """Candidates of a mesh that fit by the estimate of their weights."""
    rows = plan.stage.rows // math.prod(sizes[axis] for axis in ROWS)
    length = plan.batch.tokens.shape[1]
    held = _Held.of(plan, sizes)
    for accumulation in (1, 2, 4, 8, 16):
        if rows % accumulation:
            continue
        for remat in REMATS:
            tokens = rows * length  # of a device in a step
            kept = _kept(plan, tokens / accumulation, remat) / sizes["tensor"]
            memory = held.state + kept
            if memory > FULL * hardware.memory:
                continue
            forward = FORWARD[remat]
            compute = 2 * tokens * (held.student * (forward + 2) + held.teacher)
            sent = accumulation * (
                (forward + 1) * held.gathered_student + held.gathered_teacher + held.gradients
            )
            sent += _activations(plan, sizes, tokens, forward)
            seconds = compute / sizes["tensor"] / hardware.flops + sent / hardware.links
            yield Candidate(MeshConfig(**sizes), accumulation, remat, memory, seconds)


class _Held(NamedTuple):
    """Sums over the parameters of a stage on one device.

    Attributes:
      state: Bytes of weights, moments and gradients.
      student, teacher: Weights that one token meets.
      gathered_student, gathered_teacher: Bytes sent to gather all weights once.
      gradients: Bytes sent to sum the gradients once.
    """

    state: float
    student: float
    teacher: float
    gathered_student: float
    gathered_teacher: float
    gradients: float

    @classmethod
    def of(cls, plan: Planned, sizes: Mapping[str, int]) -> "_Held":
        """The sums of a stage on a mesh of these sizes."""
        shapes = llava.abstract(plan.student)
        trained = set(split_trained(shapes, plan.stage.trains)[0])
        state = student = teacher = to_student = to_teacher = gradients = 0.0
        for name, here, parts, weights in _parameters(plan.student, shapes, sizes):
            trains = name in trained
            state += here * (4 * FLOAT32 if trains else HALF)
            sent = here * (parts - 1)
            to_student += sent * HALF
            gradients += trains * FLOAT32 * (sent + here * 2 * (1 - 1 / sizes["data"]))
            student += weights
        if plan.teacher:
            shapes = without_tower(llava.abstract(plan.teacher))
            for _, here, parts, weights in _parameters(plan.teacher, shapes, sizes):
                state += here * HALF
                to_teacher += here * (parts - 1) * HALF
                teacher += weights
        return cls(state, student, teacher, to_student, to_teacher, gradients)


def _parameters(
    config: ModelConfig, shapes: Mapping, sizes: Mapping[str, int]
) -> Iterator[tuple[str, float, int, float]]:
    """(name, numbers on a device, ways that are gathered, weights that a token meets)."""
    axes, moe, mesh = llava.axes(config), config.decoder.moe, _abstract(sizes)
    for name, array in shapes.items():
        spec = partition(mesh, array.shape, axes[name])
        here = math.prod(array.shape) / math.prod(ways(mesh, split) for split in spec)
        gathered = math.prod(
            ways(mesh, split) for split, logical in zip(spec, axes[name]) if logical in GATHERED
        )
        share = moe.experts_per_token / moe.num_experts if moe and ".experts." in name else 1
        yield name, here, gathered, math.prod(array.shape) * share


def _kept(plan: Planned, tokens: float, remat: str) -> float:
    """Bytes of activations that a micro-batch keeps for its backward pass."""
    decoder = plan.student.decoder
    choices = decoder.moe.experts_per_token if decoder.moe else 1
    inner = 3 * decoder.intermediate_size * choices + 4 * decoder.num_heads * decoder.head_dim
    kept = decoder.num_layers * (decoder.hidden_size + KEPT[remat] * inner) + 2 * inner
    if plan.teacher:
        kept += 3 * plan.teacher.decoder.intermediate_size
    return tokens * kept * HALF


def _activations(plan: Planned, sizes: Mapping[str, int], tokens: float, forward: float) -> float:
    """Bytes of activations that a device sends in a step."""
    tensor, expert = sizes["tensor"], sizes["expert"]
    decoder = plan.student.decoder
    wide = decoder.num_layers * decoder.hidden_size * (forward + 1)
    if plan.teacher:
        wide += plan.teacher.decoder.num_layers * plan.teacher.decoder.hidden_size
    sent = 2 * 2 * (tensor - 1) / tensor * wide
    if decoder.moe:
        rows = decoder.moe.experts_per_token * decoder.hidden_size * len(decoder.sparse_layers)
        sent += 2 * (expert - 1) / expert * rows * (forward + 1)
    return tokens * HALF * sent
