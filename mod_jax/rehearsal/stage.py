"""One stage, compiled for devices that are not here, and what its program says."""

import dataclasses
import time

import jax
from jax.sharding import Mesh

from mod_jax.rehearsal.hardware import Hardware
from mod_jax.rehearsal.memory import Memory, memory_of, read_by, refused
from mod_jax.rehearsal.program import read
from mod_jax.rehearsal.recipe import Planned
from mod_jax.rehearsal.roofline import Costs, Roofline, attention_flops, costs, roofline
from mod_jax.rehearsal.step import Prepared, compile_prepared, prepare_step
from mod_jax.rehearsal.trips import work_of
from mod_jax.sharding import row_ways

# Compiles in less time; memory and the order of instructions differ from those of a run.
QUICK = {"exec_time_optimization_effort": -1.0}


class CompilerFailed(RuntimeError):
    """A compiler that made no program of a step; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """What is known of a stage's step.

    Attributes:
      plan: The stage.
      memory: Memory of one device.
      seconds: How long it took to compile.
      costs, attention, roofline: What one device does, operations of attention's kernels, and what
        that takes; None if the compiler refused the step.
    """

    plan: Planned
    memory: Memory
    seconds: float
    costs: Costs | None = None
    attention: float = 0.0
    roofline: Roofline | None = None

    @property
    def positions(self) -> int:
        """Positions of a step, padding included."""
        rows, length = self.plan.batch.tokens.shape
        return rows * length


def prepare(plan: Planned, mesh: Mesh) -> Prepared:
    """Makes a stage's step; raises ConfigError if it does not fit the mesh."""
    return prepare_step(plan.stage, plan.student, plan.teacher, mesh, plan.batch)


def rehearse(
    plan: Planned, mesh: Mesh, hardware: Hardware, slices: int = 1, quick: bool = False
) -> Rehearsed:
    """Compiles the step of a stage and reads its program.

    Args:
      plan: The stage.
      mesh: Of devices from `topology.devices`.
      hardware: What such a device can do.
      slices: Number of slices of the mesh.
      quick: Whether the TPU compiler may take less time, and make a less good program.

    Raises:
      ConfigError: If the stage does not fit the mesh.
      CompilerFailed: If the compiler refuses the step for another reason than memory.
    """
    prepared = prepare(plan, mesh)
    device = mesh.devices.flat[0]
    on_tpu = device.platform == "tpu"
    # libtpu 0.0.42 aborts if it is to make a program for a TPU7x with less effort
    options = QUICK if quick and on_tpu and device.device_kind != "TPU7x" else None
    start = time.time()
    try:
        compiled = compile_prepared(prepared, mesh, options)
    except jax.errors.JaxRuntimeError as error:
        memory = refused(str(error), read_by(prepared, mesh))
        if memory is None:
            reason = " ".join(str(error).split())[:300]
            raise CompilerFailed(f"the compiler refused the step: {reason}") from None
        return Rehearsed(plan, memory, time.time() - start)
    seconds = time.time() - start
    program = read(compiled.as_text() or "")
    rows, length = plan.batch.tokens.shape
    rows_of_device = rows / row_ways(mesh)
    # A micro-batch of rows without padding, of which the loss reads every position.
    positions = int(rows_of_device * length / plan.stage.accumulation)
    work = work_of(plan.student, mesh.shape, positions, positions)
    found = costs(program, mesh.shape, work, slices, on_tpu)
    attention = 0.0
    if device.platform != "cpu":  # there it is no kernel
        pictures = plan.batch.images.shape[1]
        attention = attention_flops(plan.student, plan.teacher, rows_of_device, length, pictures)
        attention /= mesh.shape["tensor"]
    memory = memory_of(compiled, program, prepared, mesh)
    roof = roofline(found, attention, hardware)
    return Rehearsed(plan, memory, seconds, found, attention, roof)
