"""Runs one stage: restores where it stopped, steps, logs, saves."""

import dataclasses
import pathlib
import time

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mod_jax import sharding
from mod_jax.batch import Batch
from mod_jax.config import ConfigError, ModelConfig, StageConfig
from mod_jax.data.batches.pipeline import Batches
from mod_jax.training import checkpoint, metrics
from mod_jax.training.state import Frozen, make_optimizer, new_state
from mod_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Stage:
    """All that running one stage needs.

    Attributes:
      name: of the stage.
      config: of the stage.
      student, teacher: configurations; teacher None where the objective needs none.
      trained: name -> f32 array, where training starts from.
      frozen: what is read.
      data: the batches, from their beginning.
      folder: of the stage's checkpoints and metrics.
      about: JSON that goes into each checkpoint: resolved configuration, origin and checksum of the frozen parts.
    """

    name: str
    config: StageConfig
    student: ModelConfig
    teacher: ModelConfig | None
    trained: dict
    frozen: Frozen
    data: Batches
    folder: pathlib.Path
    about: dict


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """Rows of this host's numpy batch -> global arrays split over the mesh."""
    rows = sharding.row_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), batch
    )


def run(stage: Stage, mesh: Mesh, keep: int, log_every: int) -> dict:
    """Trains to the stage's last step, continuing from its newest checkpoint.

    Returns:
      The trained parameters, name -> array.
    Raises:
      ConfigError: before compilation: a mesh or a checkpoint that does not fit, frozen parts that are not those of the checkpoint.
      TooManyBadSamples, WorkerDied: from the data.
    """
    steps, optimizer = (
        stage.config.steps,
        make_optimizer(stage.config.optimizer, stage.config.steps),
    )
    step_function, state_shardings, frozen_shardings = make_train_step(
        stage.config, stage.student, stage.teacher, optimizer, mesh, stage.trained, stage.frozen
    )
    saved = checkpoint.Checkpoints(stage.folder / "checkpoints", keep)
    done = saved.latest or 0
    if done:
        check_same(saved.metadata(done), stage.about, stage.folder)
        shapes = jax.eval_shape(lambda params: new_state(params, optimizer), stage.trained)
        state = saved.restore(done, checkpoint.abstract(shapes, state_shardings), stage.data)
    else:
        # copied: the step donates its state, and whoever made `trained` may still read it
        params = jax.tree.map(
            lambda x, s: jax.device_put(np.array(x), s), stage.trained, state_shardings.params
        )
        state = jax.jit(
            lambda params: new_state(params, optimizer),
            donate_argnums=0,
            out_shardings=state_shardings,
        )(params)
    if done >= steps:
        saved.close()
        return state.params
    frozen = jax.device_put(stage.frozen, frozen_shardings)
    writer, pending = metrics.Writer(stage.folder, done), []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[seen]}"),
    )
    with Progress(*columns, refresh_per_second=2) as progress:
        bar, since = (
            progress.add_task(stage.name, total=steps, completed=done, seen=""),
            time.perf_counter(),
        )
        for step in range(done + 1, steps + 1):
            state, pairs = step_function(state, frozen, to_devices(next(stage.data), mesh))
            pending.append(
                pairs
            )  # read when logged: until then steps are dispatched without waiting for each other
            if step % log_every == 0 or step == steps:
                values, pending = metrics.mean(pending), []
                now = time.perf_counter()
                values |= {
                    "steps_per_second": (step - progress.tasks[bar].completed) / (now - since),
                    "skipped": _over_processes(stage.data.skips.total.bad),
                }
                since = now
                writer.write(step, values)
                progress.update(bar, completed=step, seen=f"loss {values['loss']:.3f}")
            if step % stage.config.checkpoint_every == 0 or step == steps:
                saved.save(step, state, stage.data, stage.about)
    saved.close()
    writer.close()
    return state.params


def _over_processes(count: int) -> int:
    """A count of every process, added up."""
    return int(multihost_utils.process_allgather(np.int32(count)).sum())


def check_same(saved: dict, now: dict, folder: pathlib.Path) -> None:
    """Raises ConfigError, naming each difference, if what a checkpoint says of itself is not what is said `now` under the same keys."""
    before, after = (
        flatten_dict({key: about.get(key, {}) for key in now}, sep=".") for about in (saved, now)
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
