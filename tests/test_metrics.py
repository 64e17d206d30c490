"""Metrics: means over steps are true means, and every row of metrics.jsonl is valid JSON."""

import json
import math

import numpy as np
import tensorboardX

from mod_jax.training import metrics


def read(folder) -> list[dict]:
    """The rows of metrics.jsonl, by a reader that knows no NaN."""

    def refuse(word):
        raise ValueError(word)

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_mean_weights_each_step_by_its_count():
    steps = [{"kl": (np.float32(6), np.float32(3)), "none": (0.0, 0.0)}, {"kl": (1, 1)}]
    steps[1]["none"] = (0.0, 0.0)
    assert metrics.mean(steps) == {"kl": 7 / 4}, "not (2 + 1) / 2; without a count no value"


def test_what_is_not_finite_is_null(tmp_path):
    writer = metrics.Writer(tmp_path, 0)
    writer.write(1, {"loss": math.nan, "kl": math.inf, "lr": 0.5})
    writer.close()
    assert read(tmp_path) == [{"step": 1, "loss": None, "kl": None, "lr": 0.5}]


def test_a_continued_run_writes_each_step_once(tmp_path):
    """Rows after the last checkpoint, and a row that was written in part, are removed."""
    writer = metrics.Writer(tmp_path, 0)
    for step in (2, 4, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    writer = metrics.Writer(tmp_path, 4)
    writer.write(6, {"loss": 0.5})
    writer.close()
    assert [(row["step"], row["loss"]) for row in read(tmp_path)] == [(2, 2), (4, 4), (6, 0.5)]


def test_a_continued_run_removes_the_events_of_later_steps(tmp_path, monkeypatch):
    """TensorBoard drops what was written at `purge_step` and after it."""
    purged = []
    monkeypatch.setattr(
        tensorboardX, "SummaryWriter", lambda *_, purge_step, **__: purged.append(purge_step)
    )
    metrics.Writer(tmp_path, 4)
    assert purged == [5], "the row of step 4 was written before its checkpoint"
