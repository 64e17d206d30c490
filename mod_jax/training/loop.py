"""Runs one stage: restores the newest checkpoint, steps, logs and saves."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh

from mod_jax import sharding
from mod_jax.batch import Array, Batch
from mod_jax.config import ConfigError, ModelConfig, StageConfig
from mod_jax.data.batches.pipeline import Batches
from mod_jax.ops.exchange_form import exchange_form
from mod_jax.storage.atomic import write_text
from mod_jax.training import checkpoint
from mod_jax.training.identity import ACCUMULATION, check_same
from mod_jax.training.int8 import Int8, quantised
from mod_jax.training.interrupt import Interrupts, Stopped
from mod_jax.training.log import Log
from mod_jax.training.state import (
    Frozen,
    TrainState,
    in_dtype_of_use,
    make_optimizer,
    may_be_int8,
    new_state,
)
from mod_jax.training.step import make_train_step

log = logging.getLogger(__name__)


class Program(NamedTuple):
    """The train step of a stage; its first call compiles it.

    Attributes:
      optimizer: From `make_optimizer`.
      step: (state, frozen, batch) -> (state, metrics); it donates the state.
      state: Shardings of the state.
      frozen: Shardings of the frozen parts.
      dtype: Dtype of the activations.
      int8_teacher: Whether the teacher's weights are int8.
    """

    optimizer: optax.GradientTransformation
    step: Callable
    state: TrainState
    frozen: Frozen
    dtype: str
    int8_teacher: bool = False


def make_program(
    config: StageConfig,
    student: ModelConfig,
    teacher: ModelConfig | None,
    mesh: Mesh,
    trained: dict,
    frozen: Frozen,
) -> Program:
    """Makes the train step of a stage; arguments and errors as for `make_train_step`."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_train_step(config, student, teacher, optimizer, mesh, trained, frozen)
    return Program(optimizer, *step, student.dtype, config.int8_teacher)


def input_shapes(program: Program, trained: dict, frozen: Frozen) -> tuple[TrainState, Frozen]:
    """Shapes of the state and the frozen parts as a step reads them; arguments as for `trace`."""

    def read(params: dict, frozen: Frozen) -> tuple[TrainState, Frozen]:
        held = in_use(frozen, program.dtype, program.int8_teacher)
        return new_state(params, program.optimizer), held

    return jax.eval_shape(read, trained, frozen)


def trace(program: Program, trained: dict, frozen: Frozen, batch: Batch) -> None:
    """Follows the shapes of a step through the models, under the ambient mesh; computes nothing.

    Args:
      program: Of the stage.
      trained: Name -> array or ShapeDtypeStruct.
      frozen: The same for the frozen parts.
      batch: A global batch of ShapeDtypeStructs.
    Raises:
      ConfigError: If they do not fit each other or the mesh.
    """
    try:
        jax.eval_shape(program.step, *input_shapes(program, trained, frozen), batch)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split("\n\n")[0].split())[:200]
        raise ConfigError(f"the train step does not fit its models and mesh: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Stage:
    """All that running one stage needs.

    Attributes:
      name: Name of the stage.
      config: Configuration of the stage.
      program: Its train step.
      trained: Name -> f32 array, the parameters that training starts from.
      frozen: The parameters that are only read.
      data: The batches, from their beginning.
      folder: Folder of the stage's checkpoints and metrics.
      metadata: Run metadata that goes into each checkpoint, in JSON types: the resolved
        configuration, and what student, teacher and data are.
    """

    name: str
    config: StageConfig
    program: Program
    trained: dict
    frozen: Frozen
    data: Batches
    folder: pathlib.Path
    metadata: dict


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """Turns this host's rows, in numpy arrays, into global arrays that are sharded by rows."""
    rows = sharding.row_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), batch
    )


def in_use(frozen: Frozen, dtype: str, int8_teacher: bool = False) -> Frozen:
    """Casts the frozen parts to the dtypes in which a step uses them; see `in_dtype_of_use`.

    An `int8_teacher` has weights that are rounded to int8 instead.
    """

    def held(name: str, x: Array, int8: bool) -> Array | Int8:
        if int8 and may_be_int8(name):
            return quantised(name, x)
        return in_dtype_of_use(name, x, dtype)

    return Frozen(
        {name: held(name, x, False) for name, x in frozen.student.items()},
        {name: held(name, x, int8_teacher) for name, x in frozen.teacher.items()},
    )


def run(stage: Stage, mesh: Mesh, keep: int, log_every: int) -> dict:
    """Trains to the stage's last step, continuing from its newest checkpoint.

    Args:
      stage: What to run.
      mesh: The ambient mesh.
      keep: Number of checkpoints that are kept.
      log_every: Steps between two rows of metrics.
    Returns:
      The trained parameters, name -> array; they stay sharded over the mesh.
    Raises:
      ConfigError: If the newest checkpoint was made with other settings, models or data.
      NotFinite: if too many steps in a row had a loss or gradient that is not finite.
      Stopped: after Ctrl-C; the state is saved.
      TooManyBadSamples: from the data.
      WorkerDied: from the data.
    """
    steps = stage.config.steps
    with contextlib.closing(checkpoint.Checkpoints(stage.folder / "checkpoints", keep)) as saved:
        done, state = _begin(stage, saved)
        if done >= steps:
            return state.params
        program = stage.program
        frozen = in_use(stage.frozen, program.dtype, program.int8_teacher)
        frozen = jax.device_put(frozen, program.frozen)
        _write_overview(stage)
        limit = stage.config.max_nonfinite_steps
        report = Log(stage.name, stage.folder, stage.data, done, steps, log_every, limit)
        with report, Interrupts() as interrupts:
            if any(".moe." in name for name in program.state.params | program.frozen.student):
                report.say(f"stage {stage.name}: expert exchange is {exchange_form(mesh)}")
            for step in range(done + 1, steps + 1):
                batch = next(stage.data)
                state, values = program.step(state, frozen, to_devices(batch, mesh))
                report.note(step, values, batch.samples)
                is_last = step == steps
                if step % stage.config.checkpoint_every and not is_last and not interrupts.received:
                    continue
                report.wait()
                # Resumed in the middle of skipped steps, their count would begin again.
                if is_last or not report.skipped_in_a_row:
                    saved.save(step, state, stage.data, stage.metadata)
                if interrupts.received and not is_last:
                    raise Stopped(
                        f"stage {stage.name} was stopped after step {step} of {steps}. The same "
                        "command, without --redo, goes on from its newest checkpoint."
                    )
    return state.params


def _begin(stage: Stage, saved: checkpoint.Checkpoints) -> tuple[int, TrainState]:
    """Restores the newest checkpoint, or makes the state before the first step.

    Returns:
      (steps that are done, state).
    """
    optimizer = stage.program.optimizer
    shardings = stage.program.state
    shapes = jax.eval_shape(lambda params: new_state(params, optimizer), stage.trained)
    restored = saved.restore_newest(
        checkpoint.abstract(shapes, shardings),
        stage.data,
        lambda metadata: _check_same(stage, metadata),
    )
    if restored is not None:
        return restored
    # The step donates its state, and others may still read `trained`: so it is copied, from device
    # to device where an earlier stage has left it there.
    params = jax.device_put(stage.trained, shardings.params, may_alias=False)
    make_state = jax.jit(
        lambda params: new_state(params, optimizer), donate_argnums=0, out_shardings=shardings
    )
    return 0, make_state(params)


def _check_same(stage: Stage, saved: dict) -> None:
    check_same(saved, stage.metadata, stage.name, stage.folder)
    before = saved.get(ACCUMULATION)
    now = stage.metadata.get(ACCUMULATION)
    if before != now:
        log.warning(
            "stage %s: accumulation was %s and is %s. Gradients stay the same but for rounding, "
            "except those of the balance loss, which is a mean over micro-batches, and of experts "
            "with a capacity.",
            stage.name,
            before,
            now,
        )


def _write_overview(stage: Stage) -> None:
    """Writes what the stage trains and what it only reads to parameters.txt."""
    parts = {
        "trained": stage.trained,
        "frozen, of the student": stage.frozen.student,
        "frozen, of the teacher": stage.frozen.teacher,
    }
    text = "".join(
        f"{title}\n{parameter_overview.get_parameter_overview(params, include_stats=False)}\n\n"
        for title, params in parts.items()
        if params
    )
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_text(stage.folder / "parameters.txt", text)
