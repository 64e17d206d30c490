"""Runs one stage: restores the newest checkpoint, steps, logs and saves."""

import contextlib
import dataclasses
import math
import pathlib
import time
from typing import Self

import jax
import numpy as np
import optax
from clu import parameter_overview
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from mod_jax import sharding
from mod_jax.batch import Batch
from mod_jax.config import ConfigError, ModelConfig, StageConfig
from mod_jax.data.batches.pipeline import Batches
from mod_jax.storage.atomic import write_text
from mod_jax.training import checkpoint, metrics
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
      TooManyBadSamples: from the data.
      WorkerDied: from the data.
    """
    steps = stage.config.steps
    optimizer = make_optimizer(stage.config.optimizer, steps)
    train_step, state_shardings, frozen_shardings = make_train_step(
        stage.config, stage.student, stage.teacher, optimizer, mesh, stage.trained, stage.frozen
    )
    with contextlib.closing(checkpoint.Checkpoints(stage.folder / "checkpoints", keep)) as saved:
        state = _begin(stage, saved, optimizer, state_shardings)
        done = saved.latest or 0
        if done >= steps:
            return state.params
        frozen = jax.device_put(stage.frozen, frozen_shardings)
        _write_overview(stage)
        with Log(stage, done, log_every) as log:
            for step in range(done + 1, steps + 1):
                batch = to_devices(next(stage.data), mesh)
                state, values = train_step(state, frozen, batch)
                log.note(step, values)
                if step % stage.config.checkpoint_every == 0 or step == steps:
                    saved.save(step, state, stage.data, stage.metadata)
    return state.params


def _begin(
    stage: Stage,
    saved: checkpoint.Checkpoints,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
) -> TrainState:
    """Restores the newest checkpoint, or makes the state before the first step."""
    if saved.latest is not None:
        check_same(saved.metadata(saved.latest), stage.metadata, stage.folder)
        shapes = jax.eval_shape(lambda params: new_state(params, optimizer), stage.trained)
        return saved.restore(saved.latest, checkpoint.abstract(shapes, shardings), stage.data)
    # The step donates its state, and others may still read `trained`: so it is copied, from device
    # to device where an earlier stage has left it there.
    params = jax.device_put(stage.trained, shardings.params, may_alias=False)
    make_state = jax.jit(
        lambda params: new_state(params, optimizer), donate_argnums=0, out_shardings=shardings
    )
    return make_state(params)


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


class Log:
    """Writes metrics every `log_every` steps and at the end, and shows a progress bar.

    Args:
      stage: The stage that runs.
      done: Steps that were done before.
      log_every: Steps between two rows of metrics.
    """

    def __init__(self, stage: Stage, done: int, log_every: int):
        self._stage = stage
        self._log_every = log_every
        self._logged = done
        self._pending: list[dict] = []
        self._writer = metrics.Writer(stage.folder, done)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[seen]}"),
            refresh_per_second=2,
        )
        self._bar: TaskID = self._progress.add_task(
            stage.name, total=stage.config.steps, completed=done, seen=""
        )
        self._since = time.perf_counter()

    def note(self, step: int, values: dict) -> None:
        """Takes the metrics of a step, name -> (sum, count).

        They are read only when a row is due: until then steps are dispatched without waiting for
        each other.
        """
        self._pending.append(values)
        if step % self._log_every and step != self._stage.config.steps:
            return
        means = metrics.mean(self._pending)  # waits for the devices
        now = time.perf_counter()
        means["steps_per_second"] = (step - self._logged) / (now - self._since)
        means["skipped"] = _sum_over_processes(self._stage.data.skips.total.bad)
        self._writer.write(step, means)
        self._progress.update(
            self._bar, completed=step, seen=f"loss {means.get('loss', math.nan):.3f}"
        )
        self._pending = []
        self._logged = step
        self._since = now

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        self._writer.close()


def _sum_over_processes(count: int) -> int:
    return int(multihost_utils.process_allgather(np.int32(count)).sum())


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
