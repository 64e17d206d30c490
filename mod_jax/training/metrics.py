"""Metrics of training steps, and the files they are written to.

Metrics stay (sum, count) pairs until they are read, so that means over steps, micro-batches and
hosts are true means instead of means of means.
"""

import json
import math
import pathlib

import jax

from mod_jax.storage.atomic import write_text


def mean(steps: list[dict]) -> dict[str, float]:
    """Means of the metrics over several steps.

    Args:
      steps: Metrics of each step, name -> (sum, count).

    Returns:
      Name -> sum of the sums / sum of the counts. Metrics whose counts are all 0 are left out.
    """
    read = jax.device_get(steps)
    means = {}
    for name in read[0]:
        total = sum(float(step[name][0]) for step in read)
        count = sum(float(step[name][1]) for step in read)
        if count > 0:
            means[name] = total / count
    return means


class Writer:
    """Appends metrics to metrics.jsonl and to TensorBoard event files.

    The event files are written by tensorboardX, because clu's writers need TensorFlow.

    Args:
      folder: Folder of the stage.
      step: Step that training continues from. Rows of later steps are removed: a run that was
        killed wrote them after its last checkpoint.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        from tensorboardX import SummaryWriter  # it imports torch, where that is installed

        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        kept = [line for line in self._complete_lines() if json.loads(line)["step"] <= step]
        write_text(self._path, "".join(kept))
        self._events = SummaryWriter(
            str(folder / "events"), purge_step=step + 1, write_to_disk=True
        )

    def _complete_lines(self) -> list[str]:
        """Lines of metrics.jsonl, without one that a killed run wrote in part."""
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        return [line for line in lines if line.endswith("}\n")]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of one step; JSON has no word for NaN and infinity but null."""
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the event files."""
        self._events.close()
