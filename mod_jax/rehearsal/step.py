"""Compiles a train step from shapes alone, for devices that need not be here."""

import typing

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mod_jax.batch import Batch
from mod_jax.config import ModelConfig, StageConfig
from mod_jax.models import llava
from mod_jax.models.vision import without_tower
from mod_jax.rehearsal.topology import compiling_for
from mod_jax.training import loop
from mod_jax.training.state import Frozen, split_trained


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
    """
    shapes = llava.abstract(student)
    trained, rest = (
        {name: shapes[name] for name in names} for names in split_trained(shapes, stage.trains)
    )
    frozen = Frozen(rest, without_tower(llava.abstract(teacher)) if teacher else {})
    program = loop.make_program(stage, student, teacher, mesh, trained, frozen)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)), batch)
    inputs = loop.input_shapes(program, trained, frozen)
    step = typing.cast(jax.stages.Wrapped, program.step)
    with compiling_for(mesh):
        return step.lower(*inputs, batch).compile(compiler_options=options)
