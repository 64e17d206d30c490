"""Orbax checkpoints of a stage: trained weights and optimizer, the data's position, and what the run was."""

import dataclasses
import json

import jax
import orbax.checkpoint as ocp
from etils import epath

from mod_jax.config import ConfigError
from mod_jax.training.state import TrainState


class StreamsHandler(ocp.CheckpointHandler):
    """The states of the data's streams, by number: every process writes those it has, and reads those it is to have.

    Equivalent to Grain's handler where each process has one iterator; that one is restored on as many processes as it was saved on.
    """

    def save(self, directory: epath.Path, args: "SaveStreams") -> None:
        """Writes this process's file, at once: Orbax commits the folder when all processes have."""
        (directory / f"process_{jax.process_index()}.json").write_text(json.dumps(args.states))

    def restore(self, directory: epath.Path, args: "RestoreStreams") -> dict[int, dict]:
        """The states of all streams."""
        del args
        files = [json.loads(path.read_text()) for path in directory.glob("process_*.json")]
        return {int(number): state for file in files for number, state in file.items()}


@ocp.args.register_with_handler(StreamsHandler, for_save=True)
@dataclasses.dataclass
class SaveStreams(ocp.args.CheckpointArgs):
    """What StreamsHandler saves: number of a stream -> JSON."""

    states: dict[int, dict]


@ocp.args.register_with_handler(StreamsHandler, for_restore=True)
@dataclasses.dataclass
class RestoreStreams(ocp.args.CheckpointArgs):
    """All that StreamsHandler finds."""


def _tree(state: TrainState) -> dict:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


class Checkpoints:
    """The last `keep` checkpoints of one stage, written while training goes on; a kill in mid-save leaves the previous one.

    Args:
      folder: local, or gs://.
      keep: how many stay.
    """

    def __init__(self, folder: epath.PathLike, keep: int):
        self.folder = epath.Path(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        # named, so that a checkpoint's metadata can be read before anything is restored
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": StreamsHandler(),
            "about": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data, about: dict) -> None:
        """Starts to save; returns as soon as the state may change again.

        Args:
          step: steps done.
          state: to save.
          data: the iterator of batches, at its position (`data.pipeline.Batches`).
          about: JSON: configuration, frozen parts.
        """
        items = {
            "state": ocp.args.StandardSave(_tree(state)),
            "data": SaveStreams(data.get_state()),
            "about": ocp.args.JsonSave(about),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def about(self, step: int) -> dict:
        """What was said of the run at `step`."""
        return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))[
            "about"
        ]

    def restore(self, step: int, state: TrainState, data) -> TrainState:
        """Reads a state and sets the data iterator back to its position, be it on another number of processes.

        Args:
          state: abstract (shapes, dtypes and shardings to restore to).
          data: the iterator of batches; None leaves the data's position alone.
        Raises:
          ConfigError: if the checkpoint holds other parameters or shapes.
        """
        self._check(step, state)
        items = {"state": ocp.args.StandardRestore(_tree(state))}
        if data is not None:
            items["data"] = RestoreStreams()
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        if data is not None:
            data.set_state(restored["data"])
        return TrainState(**restored["state"])

    def _check(self, step: int, state: TrainState) -> None:
        stored = self._manager.item_metadata(step)["state"]["params"]
        there = {name: tuple(array.shape) for name, array in stored.items()}
        wanted = {name: tuple(array.shape) for name, array in state.params.items()}
        wrong = [
            f"{n}: checkpoint {there.get(n)}, configuration {wanted.get(n)}"
            for n in sorted({*there, *wanted})
            if there.get(n) != wanted.get(n)
        ]
        if wrong:
            raise ConfigError(
                f"{self.folder}/{step} holds another model; use another --workdir or the configuration it was made with: "
                + "; ".join(wrong)
            )

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.close()


def abstract(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, as `restore` needs them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
