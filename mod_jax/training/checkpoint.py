"""Orbax checkpoints of a stage: trained weights, optimizer, the data's position, and metadata."""

import contextlib
import dataclasses
import gc
import json
import logging
import traceback
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from mod_jax.config import ConfigError
from mod_jax.data.batches.pipeline import Batches
from mod_jax.training.state import TrainState

log = logging.getLogger(__name__)

T = TypeVar("T")


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


class Unreadable(ConfigError):
    """A checkpoint whose files are truncated, empty or missing."""


class Checkpoints:
    """The last checkpoints of one stage.

    They are written while training goes on. A kill in the middle of a save leaves the previous
    checkpoint as the newest one.

    Args:
      folder: A local folder, or gs://. It is made by the first save.
      keep: Number of checkpoints that are kept.
    """

    def __init__(self, folder: epath.PathLike, keep: int):
        self.folder = epath.Path(folder)
        self._keep = keep
        self._opened: ocp.training.Checkpointer | None = None

    @property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        if self._opened is None:  # Orbax makes the folder: reading a run must not change it
            with _orbax_silent():
                self._opened = ocp.training.Checkpointer(
                    self.folder,
                    preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
                )
        return self._opened

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, the newest first."""
        if not self.folder.exists():
            return []
        return [checkpoint.step for checkpoint in reversed(self._checkpointer.checkpoints)]

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return next(iter(self.steps), None)

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
        """Returns the run metadata stored with checkpoint `step`.

        Raises:
          Unreadable: if there is none.
        """
        with self._reading(step):
            metadata = self._checkpointer.metadata(step)
            if not metadata.custom_metadata or not metadata.metadata:
                raise ValueError("its description is missing")
            return metadata.custom_metadata

    def newest(self) -> tuple[int, dict] | None:
        """Returns step and run metadata of the newest checkpoint whose metadata can be read.

        Raises:
          Unreadable: if there are checkpoints, but this cannot be read of any.
        """
        return self._first(lambda step: (step, self.metadata(step)))

    def restore_newest(
        self, state: TrainState, data: Batches, check: Callable[[dict], None]
    ) -> tuple[int, TrainState] | None:
        """Restores the newest checkpoint that can be read; see `restore`.

        Those that cannot be read are put aside, as STEP.unreadable, and named in one line each.

        Args:
          state: As for `restore`.
          data: As for `restore`.
          check: Refuses the run metadata of another run.
        Returns:
          (step, state); None if there are no checkpoints.
        Raises:
          Unreadable: if there are checkpoints, but none can be read.
          ConfigError: from `check`, or as `restore`.
        """

        def restore(step: int) -> tuple[int, TrainState]:
            check(self.metadata(step))
            return step, self.restore(step, state, data)

        restored = self._first(restore)
        if restored is not None:
            self._put_aside([step for step in self.steps if step > restored[0]])
        return restored

    def _first(self, read: Callable[[int], T]) -> T | None:
        """Returns what `read` returns for the newest step whose files it can read."""
        failures: list[Unreadable] = []
        for step in self.steps:
            try:
                found = read(step)
            except Unreadable as error:
                failures.append(error)
                continue
            for failure in failures:
                log.warning("%s The checkpoint of step %d is taken.", failure, step)
            return found
        if failures:
            raise failures[0]
        return None

    def _put_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        self.close()
        if jax.process_index() == 0:
            for step in steps:
                (self.folder / str(step)).rename(self.folder / f"{step}.unreadable")

    def restore(self, step: int, state: TrainState, data: Batches | None) -> TrainState:
        """Reads a state, and sets the data iterator back to its position.

        The number of processes may differ from that of the run that saved.

        Args:
          step: Of the checkpoint.
          state: Shapes, dtypes and shardings to restore to, see `abstract`.
          data: The iterator of batches; None leaves the data's position alone.
        Raises:
          Unreadable: if files of the checkpoint are truncated, empty or missing.
          ConfigError: if the checkpoint holds other parameters or shapes.
        """
        parts: dict = {"state": _tree(state)}
        if data is not None:
            parts["data"] = StreamStates()
        with self._reading(step):
            self._check(step, state)
            restored = self._checkpointer.load_checkpointables(step, parts)
            if data is not None:
                data.set_state(restored["data"].states)
        return TrainState(**restored["state"])

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns what Orbax raises and logs about broken files into one line.

        There is no class of errors for them: it raises TypeError, KeyError, ValueError and its own.
        """
        try:
            with _orbax_silent():
                yield
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001
            reason = " ".join(str(error).split())[:80] or type(error).__name__
            raise Unreadable(
                f"{self.folder}/{step} cannot be read ({reason}): expected a complete checkpoint."
            ) from None

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
        if self._opened is not None:
            self._opened.close()
            self._opened = None


@contextlib.contextmanager
def _orbax_silent() -> Iterator[None]:
    """Keeps what Orbax logs about broken files, at any level and in many lines, to itself."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                yield
            except Exception as error:
                traceback.clear_frames(error.__traceback__)
                gc.collect()  # tasks that failed log their errors when they are collected
                raise
    finally:
        logging.disable(disabled)


def abstract(state: TrainState, shardings: TrainState) -> TrainState:
    """Returns shapes, dtypes and shardings of a state, as `Checkpoints.restore` needs them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
