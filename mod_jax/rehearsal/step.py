"""Compiles a train step from shapes alone, for devices that need not be here."""

import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mod_jax.batch import Batch
from mod_jax.config import ModelConfig, StageConfig
from mod_jax.models import llava
from mod_jax.models.vision import without_tower
from mod_jax.rehearsal.topology import compiling_for
from mod_jax.training import loop
from mod_jax.training.state import Frozen, TrainState, split_trained


class Prepared(NamedTuple):
    """A train step and what it reads, before it is compiled.

    Attributes:
      program: The step, and the shardings of what it reads.
      state, frozen: Shapes of what it reads.
      batch: Shapes of the global batch.
    """

    program: loop.Program
    state: TrainState
    frozen: Frozen
    batch: Batch


def prepare_step(
    stage: StageConfig,
    student: ModelConfig,
    teacher: ModelConfig | None,
    mesh: Mesh,
    batch: Batch,
) -> Prepared:
    """Makes the train step that a run would make; arguments and errors as for `compile_step`."""
    shapes = llava.abstract(student)
    trained, rest = (
        {name: shapes[name] for name in names} for names in split_trained(shapes, stage.trains)
    )
    frozen = Frozen(rest, without_tower(llava.abstract(teacher)) if teacher else {})
    program = loop.make_program(stage, student, teacher, mesh, trained, frozen)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)), batch)
    return Prepared(program, *loop.input_shapes(program, trained, frozen), batch)


def compile_prepared(
    prepared: Prepared, mesh: Mesh, options: dict | None = None
) -> jax.stages.Compiled:
    """Compiles a prepared step; arguments as for `compile_step`."""
    step = typing.cast(jax.stages.Wrapped, prepared.program.step)
    with compiling_for(mesh):
        lowered = step.lower(prepared.state, prepared.frozen, prepared.batch)
        return lowered.compile(compiler_options=options)


def compile_step(
    stage: StageConfig,
    student: ModelConfig,
    teacher: ModelConfig | None,
    mesh: Mesh,
    batch: Batch,
    options: dict | None = None,
) -> jax.stages.Compiled:
    """Compiles the train step that a run would compile.

    Args:
      stage: Configuration of the stage.
      student, teacher: The models; None without a teacher.
      mesh: Of devices from `topology.devices`, or of real ones.
      batch: The global batch; only its shapes are read.
      options: The compiler's options.

    Raises:
      ConfigError: If the stage, the models and the mesh do not fit each other.
    """
    prepared = prepare_step(stage, student, teacher, mesh, batch)
    return compile_prepared(prepared, mesh, options)
