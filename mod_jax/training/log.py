"""What a running stage reports: rows of metrics, a progress bar, and steps that were skipped."""

import collections
import logging
import math
import pathlib
import time
from typing import NamedTuple, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from mod_jax.batch import Array
from mod_jax.data.batches.pipeline import Batches
from mod_jax.training import metrics

IN_FLIGHT = 2  # steps that may be dispatched before the devices have finished an earlier one
MOST_NAMED = 8  # samples of a skipped step that are named

log = logging.getLogger(__name__)


class NotFinite(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class _Step(NamedTuple):
    """A step that the devices may still compute.

    Attributes:
      number: Number of the step.
      values: Its metrics, name -> (sum, count).
      samples: i32[B,G], its samples, as in `Batch`.
      read: Numbers of records that this process has read until then.
    """

    number: int
    values: dict
    samples: Array
    read: np.ndarray


class Log:
    """Follows the steps of a stage, writes metrics every `log_every` steps, and shows a bar.

    At most `IN_FLIGHT` steps are dispatched ahead of the devices. A step whose update was skipped
    is named with its samples, and too many of them in a row end the run.

    Args:
      name: Name of the stage.
      folder: Folder of the stage.
      data: The batches.
      done: Steps that were done before.
      steps: Steps of the whole stage.
      log_every: Steps between two rows of metrics; the last step has one too.
      max_nonfinite: Number of skipped steps in a row that ends the run.
    """

    def __init__(
        self,
        name: str,
        folder: pathlib.Path,
        data: Batches,
        done: int,
        steps: int,
        log_every: int,
        max_nonfinite: int,
    ):
        self._name = name
        self._data = data
        self._steps = steps
        self._log_every = log_every
        self._limit = min(max_nonfinite, steps)  # a stage without a single update is no success
        self._in_flight: collections.deque[_Step] = collections.deque()
        self._pending: list[dict] = []
        self.skipped_in_a_row = 0
        self._timed: tuple[int, float] | None = None  # step, and the time at which it was done
        self._writer = metrics.Writer(folder, done)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[seen]}"),
            refresh_per_second=2,
        )
        self._bar: TaskID = self._progress.add_task(name, total=steps, completed=done, seen="")

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def note(self, step: int, values: dict, samples: Array) -> None:
        """Takes the metrics of a dispatched step, name -> (sum, count), and its samples.

        Raises:
          NotFinite: if too many steps in a row were skipped.
          TooManyBadSamples: if all processes together have read too many bad records.
        """
        self._in_flight.append(_Step(step, values, samples, _read(self._data)))
        while len(self._in_flight) > IN_FLIGHT:
            self._finish(self._in_flight.popleft())

    def wait(self) -> None:
        """Waits for all steps, and writes the rows that are due; raises as `note`."""
        while self._in_flight:
            self._finish(self._in_flight.popleft())

    def _finish(self, step: _Step) -> None:
        values = jax.device_get(step.values)  # waits for the devices
        self._pending.append(values)
        if values["nonfinite"][0]:
            self._note_skipped(step)
        else:
            self.skipped_in_a_row = 0
        now = time.perf_counter()
        if self._timed is None:
            self._timed = step.number, now  # the first step has waited for its compilation
        if step.number % self._log_every == 0 or step.number == self._steps:
            self._write_row(step, now)

    def _note_skipped(self, step: _Step) -> None:
        self.skipped_in_a_row += 1
        log.warning(
            "stage %s, step %d: the loss or a gradient is not finite, so its update is skipped; "
            "its samples: %s",
            self._name,
            step.number,
            self._names(step.samples),
        )
        if self.skipped_in_a_row >= self._limit:
            raise NotFinite(
                f"stage {self._name}: the loss or a gradient was not finite in the last "
                f"{self.skipped_in_a_row} steps, up to step {step.number}; max_nonfinite_steps = "
                f"{self._limit} ends the run. The last good checkpoint is kept. Lower "
                "optimizer.lr, or remove the samples that the log names."
            )

    def _names(self, samples: Array) -> str:
        """Names of the first samples of a batch, and how many there are beside them."""
        numbers = [int(number) for number in np.ravel(samples) if number >= 0]
        named = [f"record {n} ({self._name_of(n)})" for n in numbers[:MOST_NAMED]]
        others = len(numbers) - len(named)
        return ", ".join(named) + (f" and {others} others" if others else "")

    def _name_of(self, number: int) -> str:
        """The record's id; `number` counts through all sources."""
        for source in self._data.sources:
            if number < len(source):
                return source.name(number)
            number -= len(source)
        raise IndexError(number)

    def _write_row(self, step: _Step, now: float) -> None:
        means = metrics.mean(self._pending)
        assert self._timed is not None
        number, since = self._timed
        if step.number > number:
            means["steps_per_second"] = (step.number - number) / (now - since)
        read = _sum_over_processes(step.read)
        bad, _, truncated = read.sum(0).tolist()
        self._writer.write(step.number, means | {"skipped": bad, "truncated": truncated})
        self._progress.update(
            self._bar, completed=step.number, seen=f"loss {means.get('loss', math.nan):.3f}"
        )
        self._pending = []
        self._timed = step.number, now
        self._data.skips.judge([(bad, seen) for bad, seen, _ in read.tolist()])

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        self._writer.close()
        for line in self._data.skips.unused_keys():
            log.warning("stage %s, %s", self._name, line)


def _read(data: Batches) -> np.ndarray:
    """Returns i32[sources,3]: the bad records, the records seen, and the truncated ones."""
    counts = data.skips.by_source
    return np.array([(source.bad, source.seen, source.truncated) for source in counts], np.int32)


def _sum_over_processes(counts: np.ndarray) -> np.ndarray:
    gathered = multihost_utils.process_allgather(counts)
    return np.reshape(gathered, (-1, *counts.shape)).sum(0)
