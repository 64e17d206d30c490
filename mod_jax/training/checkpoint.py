"""Orbax checkpoints of a stage: trained weights and optimizer, the data's position, and what the run was."""

import dataclasses

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from mod_jax.config import ConfigError
from mod_jax.training.state import TrainState


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
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": grain.checkpoint.CheckpointHandler(), "about": ocp.JsonCheckpointHandler()}
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
          data: the Grain iterator, at its position.
          about: JSON: configuration, frozen parts, skipped samples.
        """
        items = {"state": ocp.args.StandardSave(_tree(state)), "data": grain.checkpoint.CheckpointSave(data), "about": ocp.args.JsonSave(about)}
        self._manager.save(step, args=ocp.args.Composite(**items))

    def about(self, step: int) -> dict:
        """What was said of the run at `step`."""
        return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]

    def restore(self, step: int, state: TrainState, data) -> TrainState:
        """Reads a state and sets the data iterator back to its position.

        Args:
          state: abstract (shapes, dtypes and shardings to restore to).
          data: the Grain iterator; None leaves the data's position alone.
        Raises:
          ConfigError: if the checkpoint holds other parameters or shapes.
        """
        self._check(step, state)
        items = {"state": ocp.args.StandardRestore(_tree(state))}
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointRestore(data)
        return TrainState(**self._manager.restore(step, args=ocp.args.Composite(**items))["state"])

    def _check(self, step: int, state: TrainState) -> None:
        stored = self._manager.item_metadata(step)["state"]["params"]
        there = {name: tuple(array.shape) for name, array in stored.items()}
        wanted = {name: tuple(array.shape) for name, array in state.params.items()}
        wrong = [f"{n}: checkpoint {there.get(n)}, configuration {wanted.get(n)}" for n in sorted({*there, *wanted}) if there.get(n) != wanted.get(n)]
        if wrong:
            raise ConfigError(f"{self.folder}/{step} holds another model; use another --workdir or the configuration it was made with: " + "; ".join(wrong))

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.close()


def abstract(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, as `restore` needs them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
