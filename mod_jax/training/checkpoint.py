"""Orbax checkpoints of a stage: trained weights, optimizer, the data's position, and metadata."""

import dataclasses
import json
from collections.abc import Awaitable

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from mod_jax.config import ConfigError
from mod_jax.data.batches.pipeline import Batches
from mod_jax.training.state import TrainState


@dataclasses.dataclass
class StreamStates:
    """The states of the data's streams, as an Orbax `StatefulCheckpointable`.

    Every process saves the states that it has, and loads those of all processes. Equivalent to
    Grain's own checkpointable where each process has one iterator; but that one can only be loaded
    by as many processes as have saved it.

    Attributes:
      states: Number of a stream -> its state, in JSON types.
    """

    states: dict[int, dict] = dataclasses.field(default_factory=dict)

    async def save(self, directory: ocp.path.PathAwaitingCreation) -> Awaitable[None]:
        """Writes this process's file in the background; the states are taken now."""
        name = f"process_{jax.process_index()}.json"
        text = json.dumps(self.states)

        async def write() -> None:
            folder = await directory.await_creation()
            (folder / name).write_text(text)

        return write()

    async def load(self, directory: epath.Path) -> Awaitable[None]:
        """Reads the files of all processes."""

        async def read() -> None:
            for path in directory.glob("process_*.json"):
                states = json.loads(path.read_text())
                self.states |= {int(number): state for number, state in states.items()}

        return read()


def _tree(state: TrainState) -> dict:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


class Checkpoints:
    """The last checkpoints of one stage.

    They are written while training goes on. A kill in the middle of a save leaves the previous
    checkpoint as the newest one.

    Args:
      folder: A local folder, or gs://.
      keep: Number of checkpoints that are kept.
    """

    def __init__(self, folder: epath.PathLike, keep: int):
        self.folder = epath.Path(folder)
        self._checkpointer = ocp.training.Checkpointer(
            self.folder, preservation_policy=ocp.training.preservation_policies.LatestN(keep)
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, data: Batches, metadata: dict) -> None:
        """Starts to save; returns as soon as the state's buffers may be overwritten.

        Args:
          step: Number of steps done.
          state: Train state to save.
          data: The iterator of batches, at its position.
          metadata: Run metadata in JSON types: the configuration, and what the frozen parts are.
        """
        parts = {"state": _tree(state), "data": StreamStates(data.get_state())}
        self._checkpointer.save_checkpointables_async(
            step, parts, force=True, custom_metadata=metadata
        )

    def metadata(self, step: int) -> dict:
        """Returns the run metadata stored with checkpoint `step`."""
        return self._checkpointer.metadata(step).custom_metadata

    def restore(self, step: int, state: TrainState, data: Batches | None) -> TrainState:
        """Reads a state, and sets the data iterator back to its position.

        The number of processes may differ from that of the run that saved.

        Args:
          step: Of the checkpoint.
          state: Shapes, dtypes and shardings to restore to, see `abstract`.
          data: The iterator of batches; None leaves the data's position alone.
        Raises:
          ConfigError: if the checkpoint holds other parameters or shapes.
        """
        self._check(step, state)
        parts: dict = {"state": _tree(state)}
        if data is not None:
            parts["data"] = StreamStates()
        restored = self._checkpointer.load_checkpointables(step, parts)
        if data is not None:
            data.set_state(restored["data"].states)
        return TrainState(**restored["state"])

    def _check(self, step: int, state: TrainState) -> None:
        stored = self._checkpointer.metadata(step).metadata["params"]
        there = {name: tuple(array.shape) for name, array in stored.items()}
        wanted = {name: tuple(array.shape) for name, array in state.params.items()}
        wrong = [
            f"{name}: checkpoint {there.get(name)}, configuration {wanted.get(name)}"
            for name in sorted({*there, *wanted})
            if there.get(name) != wanted.get(name)
        ]
        if wrong:
            raise ConfigError(
                f"{self.folder}/{step} holds another model; use another --workdir or the "
                "configuration it was made with: " + "; ".join(wrong)
            )

    def close(self) -> None:
        """Waits until everything is saved."""
        self._checkpointer.close()


def abstract(state: TrainState, shardings: TrainState) -> TrainState:
    """Returns shapes, dtypes and shardings of a state, as `Checkpoints.restore` needs them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
