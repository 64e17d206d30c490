"""Runs one stage: restores the newest checkpoint, steps, logs and saves."""

import contextlib
import dataclasses
import pathlib

import jax
import numpy as np
import optax
from clu import parameter_overview
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from mod_jax import sharding
from mod_jax.batch import Batch
from mod_jax.config import ConfigError, ModelConfig, StageConfig
from mod_jax.data.batches.pipeline import Batches
from mod_jax.storage.atomic import write_text
from mod_jax.training import checkpoint
from mod_jax.training.interrupt import Interrupts, Stopped
from mod_jax.training.log import Log
from mod_jax.training.state import Frozen, TrainState, make_optimizer, new_state
from mod_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Stage:
    """All that running one stage needs.

    Attributes:
      name: Name of the stage.
      config: Configuration of the stage.
      student: Configuration of the student.
      teacher: Configuration of the teacher; None where the objective needs none.
      trained: Name -> f32 array, the parameters that training starts from.
      frozen: The parameters that are only read.
      data: The batches, from their beginning.
      folder: Folder of the stage's checkpoints and metrics.
      metadata: Run metadata that goes into each checkpoint, in JSON types: the resolved
        configuration, and origin and checksum of the frozen parts.
    """

    name: str
    config: StageConfig
    student: ModelConfig
    teacher: ModelConfig | None
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
      ConfigError: before compilation, for a mesh or a checkpoint that does not fit, or if the
        frozen parts are not those of the checkpoint.
      NotFinite: if too many steps in a row had a loss or gradient that is not finite.
      Stopped: after Ctrl-C; the state is saved.
      TooManyBadSamples: from the data.
      WorkerDied: from the data.
    """
    steps = stage.config.steps
    optimizer = make_optimizer(stage.config.optimizer, steps)
    train_step, state_shardings, frozen_shardings = make_train_step(
        stage.config, stage.student, stage.teacher, optimizer, mesh, stage.trained, stage.frozen
    )
    with contextlib.closing(checkpoint.Checkpoints(stage.folder / "checkpoints", keep)) as saved:
        done, state = _begin(stage, saved, optimizer, state_shardings)
        if done >= steps:
            return state.params
        frozen = jax.device_put(stage.frozen, frozen_shardings)
        _write_overview(stage)
        limit = stage.config.max_nonfinite_steps
        log = Log(stage.name, stage.folder, stage.data, done, steps, log_every, limit)
        with log, Interrupts() as interrupts:
            for step in range(done + 1, steps + 1):
                batch = next(stage.data)
                state, values = train_step(state, frozen, to_devices(batch, mesh))
                log.note(step, values, batch.samples)
                is_last = step == steps
                if step % stage.config.checkpoint_every and not is_last and not interrupts.received:
                    continue
                log.wait()
                # Resumed in the middle of skipped steps, their count would begin again.
                if is_last or not log.skipped_in_a_row:
                    saved.save(step, state, stage.data, stage.metadata)
                if interrupts.received and not is_last:
                    raise Stopped(
                        f"stage {stage.name} was stopped after step {step} of {steps}. The same "
                        "command goes on from its newest checkpoint."
                    )
    return state.params


def _begin(
    stage: Stage,
    saved: checkpoint.Checkpoints,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
) -> tuple[int, TrainState]:
    """Restores the newest checkpoint, or makes the state before the first step.

    Returns:
      (steps that are done, state).
    """
    shapes = jax.eval_shape(lambda params: new_state(params, optimizer), stage.trained)
    restored = saved.restore_newest(
        checkpoint.abstract(shapes, shardings),
        stage.data,
        lambda metadata: check_same(metadata, stage.metadata, stage.folder),
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


def check_same(saved: dict, now: dict, folder: pathlib.Path) -> None:
    """Compares a checkpoint's run metadata with the present run's, under the keys of the latter.

    Raises:
      ConfigError: naming each difference.
    """
    before, after = (
        flatten_dict({key: metadata.get(key, {}) for key in now}, sep=".")
        for metadata in (saved, now)
    )
    wrong = [
        f"{key}: was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    if wrong:
        raise ConfigError(
            f"{folder} was made with another configuration; use another --workdir or set back: "
            + "; ".join(wrong)
        )
