"""A train step as a compiler for accelerators makes it: its memory, its FLOPs over those needed.

FLOPs are those of products with weights, loops by how often they run, over those that the step
needs (`flops`); attention's kernels are left out on both sides.
"""

import dataclasses

from jax.sharding import Mesh

from benchmarks import flops, measure
from mod_jax import objectives
from mod_jax.batch import Batch
from mod_jax.config import ModelConfig, StageConfig
from mod_jax.models import llava
from mod_jax.rehearsal import products, trips
from mod_jax.rehearsal.program import read
from mod_jax.rehearsal.step import compile_step
from mod_jax.sharding import row_ways
from mod_jax.training.state import split_trained

TRAINS = ("language_model.layers.mlp.*", "language_model.layers.moe.*", "adaptor.*")


@dataclasses.dataclass(frozen=True)
class Step:
    """A train step and the batch that it reads.

    Attributes:
      stage: The stage.
      student, teacher: The models.
      batch: The global batch.
    """

    stage: StageConfig
    student: ModelConfig
    teacher: ModelConfig
    batch: Batch


def figures(step: Step, mesh: Mesh, options: dict | None = None) -> dict:
    """Compiles a step.

    Returns:
      program: What runs, a `Program`.
      peak_gib, weights_gib, temporaries_gib: Of one device; weights are those before the step,
        optimizer state included.
      flops, needed: Of products with weights, by one device.
      ratio: The first over the second.
    """
    binary = compile_step(step.stage, step.student, step.teacher, mesh, step.batch, options)
    program = read(binary.as_text())
    trained, _ = split_trained(llava.abstract(step.student), step.stage.trains)
    needed = flops.of_step(step.stage.objective, step.student, step.teacher, trained, step.batch)
    work = work_of_device(step, mesh)
    found = 0.0
    for instruction, times in program.runs(trips.trips(work, program)):
        if product := products.product(instruction):
            # The buffer of an exchange has room to spare; kernels read the rows that arrive.
            filled = work.filled(product.rows) if product.rows else 1
            found += product.flops * times * filled
    memory = binary.memory_analysis()
    return {
        "program": program,
        "peak_gib": memory.peak_memory_in_bytes / measure.GIB,
        "weights_gib": memory.argument_size_in_bytes / measure.GIB,
        "temporaries_gib": memory.temp_size_in_bytes / measure.GIB,
        "flops": found,
        "needed": needed["dense"] / mesh.size,
        "ratio": found * mesh.size / needed["dense"],
    }


def work_of_device(step: Step, mesh: Mesh) -> trips.Work:
    """What the data of a batch give a device to do, if experts share it evenly."""
    ways = row_ways(mesh)
    tokens = int((step.batch.segment_ids > 0).sum()) // ways
    return trips.work_of(step.student, mesh.shape, -(-read_positions(step) // ways), tokens)


def read_positions(step: Step) -> int:
    """Positions of the global batch that the loss reads."""
    counts = step.batch.loss_weights > 0
    if step.stage.objective.kind == "mimic":
        counts = counts | (objectives.compared_positions(step.stage.objective, step.batch) > 0)
    return int(counts.sum())
