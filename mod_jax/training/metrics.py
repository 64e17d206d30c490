"""Metrics are (sum, count) pairs until they are read: means over steps, micro-batches and hosts are true means."""

import json
import pathlib

import jax
from tensorboardX import SummaryWriter


def mean(steps: list[dict]) -> dict[str, float]:
    """Metrics of several steps, name -> (sum, count) each -> sum / count; one without a single count is left out."""
    read = jax.device_get(steps)
    totals = {
        name: (
            sum(float(step[name][0]) for step in read),
            sum(float(step[name][1]) for step in read),
        )
        for name in read[0]
    }
    return {name: total / count for name, (total, count) in totals.items() if count > 0}


class Writer:
    """Appends to metrics.jsonl and to TensorBoard events (tensorboardX: clu's writers need TensorFlow).

    Args:
      folder: of the stage.
      step: rows past it are dropped: they belong to steps that a killed run did not save.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        kept = [line for line in self._read() if json.loads(line)["step"] <= step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(self._path)
        self._events = SummaryWriter(
            str(folder / "events"), purge_step=step + 1, write_to_disk=True
        )

    def _read(self):
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        return [line for line in lines if line.endswith("}\n")]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one row."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the events."""
        self._events.close()
