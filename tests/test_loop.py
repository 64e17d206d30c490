"""The loop of one stage, with a train step that only counts: when it waits, saves and stops."""

import dataclasses
import json
import logging
import os
import pathlib
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_jax.config import MeshConfig, StageConfig, from_dict
from mod_jax.data.batches.streams import Counts
from mod_jax.sharding import make_mesh, replicated
from mod_jax.training import log, loop
from mod_jax.training.checkpoint import Checkpoints
from mod_jax.training.interrupt import Stopped
from mod_jax.training.log import IN_FLIGHT, NotFinite
from mod_jax.training.state import Frozen, TrainState, make_optimizer, new_state

SAMPLES = np.array([[4, -1], [1, 0]], np.int32)


@dataclasses.dataclass
class Source:
    """Records with names."""

    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> str:
        return self.names[number]


class Data:
    """Batches that carry their number; `before` is called with it before each."""

    def __init__(self, before=lambda number: None):
        self.sources = [Source(["a", "b"]), Source(["c", "d", "e"])]
        self.before = before
        self.taken = 0
        self.judged = []
        self.unused = []

    @property
    def skips(self):
        """Of n batches read, n records were skipped and 2 n truncated, of two sources together."""
        counts = [Counts(9, 2 * self.taken, self.taken), Counts(9, 0, 0)]
        return types.SimpleNamespace(
            by_source=counts, judge=self.judged.append, unused_keys=lambda: self.unused
        )

    def __next__(self):
        self.taken += 1
        self.before(self.taken)
        return types.SimpleNamespace(samples=SAMPLES, number=self.taken)

    def get_state(self):
        return {0: {"taken": self.taken}}

    def set_state(self, states):
        self.taken = states[0]["taken"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the stage: run(data, bad=steps that are not finite, **configuration of the stage).

    Names in `read` are those of frozen parameters.
    """
    monkeypatch.setattr(loop, "to_devices", lambda batch, mesh: batch.number)
    monkeypatch.setattr(loop, "_write_overview", lambda stage: None)

    def run(data: Data, bad=(), read=(), log_every: int = 1, keep: int = 2, **changes):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])

        def step(state: TrainState, frozen, number: int):
            finite = number not in bad
            params = {"w": state.params["w"] + finite}
            values = {
                "loss": (jnp.float32(number if finite else 0), jnp.float32(finite)),
                "nonfinite": (jnp.float32(not finite), jnp.float32(1)),
            }
            return dataclasses.replace(state, step=state.step + 1, params=params), values

        values = {
            "trains": ("w",),
            "objective": {},
            "data": {"sources": ({"path": "none"},)},
            "steps": 7,
            "checkpoint_every": 3,
        }
        config = from_dict(StageConfig, values | changes)
        optimizer = make_optimizer(config.optimizer, config.steps)
        trained = {"w": jnp.zeros(2)}
        shapes = jax.eval_shape(lambda params: new_state(params, optimizer), trained)
        shardings = jax.tree.map(lambda _: replicated(mesh), shapes)
        stage = loop.Stage(
            name="small",
            config=config,
            program=loop.Program(
                optimizer,
                step,
                shardings,
                Frozen(dict.fromkeys(read, replicated(mesh)), {}),
                "float32",
            ),
            trained=trained,
            frozen=Frozen(dict.fromkeys(read, np.zeros(2, np.float32)), {}),
            data=data,
            folder=tmp_path,
            metadata={"config": {}},
        )
        return loop.run(stage, mesh, keep, log_every)

    return run


def saved_steps(folder: pathlib.Path) -> list[int]:
    saved = Checkpoints(folder / "checkpoints", 2)
    steps = saved.steps
    saved.close()
    return steps


def rows(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_last_step_that_checkpoint_every_does_not_divide_is_saved(run, tmp_path):
    params = run(Data())
    assert saved_steps(tmp_path) == [7, 6]
    np.testing.assert_array_equal(params["w"], 7)
    data = Data()
    run(data)
    assert data.taken == 7  # where the checkpoint says, and no further


def test_rows_count_records_skipped_and_truncated_until_their_step(run, tmp_path):
    """The last step has a row, whether `log_every` divides it or not."""
    data = Data()
    run(data, log_every=3)
    found = [(row["step"], row["skipped"], row["truncated"]) for row in rows(tmp_path)]
    assert found == [(3, 3, 6), (6, 6, 12), (7, 7, 14)]
    assert data.judged == [[(bad, 9), (0, 9)] for bad in (3, 6, 7)]
    assert [row["loss"] for row in rows(tmp_path)] == [2, 5, 7]


def test_keys_that_are_not_used_are_said_at_the_end_however_it_comes(run, caplog):
    def stop(number: int):
        if number == 4:
            raise RuntimeError("an error")

    data = Data(stop)
    data.unused = ["source a: keys not used: score (in 9 of 9 records)"]
    with pytest.raises(RuntimeError, match="an error"):
        run(data)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["stage small, source a: keys not used: score (in 9 of 9 records)"]


def test_steps_per_second_does_not_count_the_first_step(run, tmp_path, monkeypatch):
    """The first step compiles, here for 100 s. Each of the others takes half a second."""
    times = iter([100.0 + 0.5 * step for step in range(7)])
    clock = types.SimpleNamespace(perf_counter=lambda: next(times))
    monkeypatch.setattr(log, "time", clock)
    run(Data(), log_every=3)
    assert [row["steps_per_second"] for row in rows(tmp_path)] == [2.0, 2.0, 2.0]


def test_a_row_without_a_measured_step_has_no_steps_per_second(run, tmp_path):
    run(Data(), log_every=1)
    assert ["steps_per_second" in row for row in rows(tmp_path)] == [False] + [True] * 6


def test_two_steps_are_in_flight(run, monkeypatch):
    """When batch n is read, all steps up to n - 1 - IN_FLIGHT are done."""
    done: list[int] = []
    finish = log.Log._finish

    def noted(self, step):
        done.append(step.number)
        finish(self, step)

    monkeypatch.setattr(log.Log, "_finish", noted)
    waiting = []
    run(Data(lambda number: waiting.append(number - 1 - len(done))), log_every=7, steps=8)
    assert max(waiting) == IN_FLIGHT == 2


def test_the_samples_of_a_skipped_step_are_named(run, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        params = run(Data(), bad=(2,))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "stage small, step 2: the loss or a gradient is not finite, so its update is skipped; its "
        "samples: record 4 (e), record 1 (b), record 0 (a)"
    )
    np.testing.assert_array_equal(params["w"], 6)
    assert [row["nonfinite"] for row in rows(tmp_path)] == [0, 1, 0, 0, 0, 0, 0]


def test_too_many_skipped_steps_in_a_row_stop_the_run(run, tmp_path):
    """No checkpoint is made among them, so that the last good one stays and they count again."""
    message = (
        r"stage small: the loss or a gradient was not finite in the last 4 steps, up to step 8; "
        r"max_nonfinite_steps = 4 ends the run\. The last good checkpoint is kept\."
    )
    for _ in range(2):
        with pytest.raises(NotFinite, match=message) as error:
            run(Data(), bad=(2, 5, 6, 7, 8), steps=20, max_nonfinite_steps=4, keep=1)
        assert "\n" not in str(error.value)
        assert saved_steps(tmp_path) == [3]


def test_a_stage_without_a_finite_step_is_no_success(run, tmp_path):
    with pytest.raises(NotFinite, match="in the last 7 steps"):
        run(Data(), bad=range(1, 8), max_nonfinite_steps=10)
    assert saved_steps(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_says_how_it_goes_on(number, run, tmp_path, capsys):
    def interrupt(batch: int) -> None:
        if batch == 5:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    message = (
        r"stage small was stopped after step 5 of 7\. The same command, without --redo, goes on "
        r"from its newest checkpoint\."
    )
    with pytest.raises(Stopped, match=message):
        run(Data(interrupt))
    assert signal.getsignal(number) is before
    assert saved_steps(tmp_path) == [5, 3]
    assert "stopping: the step in progress is finished" in capsys.readouterr().err
    np.testing.assert_array_equal(run(Data())["w"], 7)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_second_signal_stops_at_once(run, tmp_path):
    def interrupt(batch: int) -> None:
        if batch == 5:
            signal.raise_signal(signal.SIGINT)  # to this thread, so that two do not become one
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as error:
        run(Data(interrupt))
    assert not isinstance(error.value, Stopped)
    assert saved_steps(tmp_path) == [3]


def test_everything_is_closed_when_the_data_fail(run, tmp_path, monkeypatch):
    """The checkpoint that is being written is complete, and the events are flushed."""
    closed = []
    monkeypatch.setattr(log.metrics.Writer, "close", lambda self: closed.append("writer"))

    def fail(batch: int) -> None:
        if batch == 5:
            raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        run(Data(fail))
    assert closed == ["writer"]
    assert saved_steps(tmp_path) == [3]
    np.testing.assert_array_equal(run(Data())["w"], 7)


def test_a_stage_with_experts_says_how_they_exchange_rows(run, capsys):
    line = "stage small: expert exchange is local"
    run(Data(), steps=1)
    assert line not in capsys.readouterr().out
    run(Data(), steps=2, read=["layers.moe.experts.gate.w_edf"])
    assert line in capsys.readouterr().out
