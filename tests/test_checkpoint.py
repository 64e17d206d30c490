"""Checkpoints: restored is what was saved, on any mesh; those of another model are refused."""

import asyncio
import dataclasses
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from mod_jax.config import ConfigError, MeshConfig, OptimizerConfig
from mod_jax.sharding import make_mesh, parameter_shardings, replicated
from mod_jax.training.checkpoint import Checkpoints, StreamStates, abstract
from mod_jax.training.state import TrainState, make_optimizer, new_state, state_shardings

AXES = {"a.w_df": ("embed", "mlp"), "b.scale_d": ("embed",)}
OPTIMIZER = make_optimizer(OptimizerConfig(), 10)


def make_state(shape=(8, 16), step=3) -> TrainState:
    """A state after a step, so that no moment is zero."""
    rng = np.random.default_rng(step)
    params = {
        "a.w_df": jnp.asarray(rng.normal(size=shape), jnp.float32),
        "b.scale_d": jnp.asarray(rng.normal(size=shape[:1]), jnp.float32),
    }
    _, moments = OPTIMIZER.update(params, OPTIMIZER.init(params), params)
    return TrainState(jnp.int32(step), params, moments)


def wanted_on(mesh, state: TrainState) -> TrainState:
    """The abstract state, with its shardings on a mesh."""
    shapes = jax.eval_shape(lambda p: new_state(p, OPTIMIZER), state.params)
    of_params = parameter_shardings(mesh, state.params, AXES)
    shardings = state_shardings(OPTIMIZER, state.params, of_params, replicated(mesh))
    return abstract(shapes, shardings)


class Counting:
    """Data of two streams, each of which counts and keeps what it counted as its state."""

    def __init__(self):
        self.streams = {3: {"counted": []}, 10: {"counted": []}}

    def __next__(self):
        for number, stream in self.streams.items():
            stream["counted"].append(number * len(stream["counted"]))
        return {number: stream["counted"][-1] for number, stream in self.streams.items()}

    def get_state(self):
        return self.streams

    def set_state(self, states):
        self.streams = {number: states[number] for number in self.streams}


def mesh_of(devices: int):
    """A mesh of one device, or of eight as 4 x 2."""
    config = MeshConfig(data=1, fsdp=4, tensor=2) if devices == 8 else MeshConfig()
    return make_mesh(config, jax.devices()[:devices])


@pytest.mark.parametrize("first, second", [(1, 1), (1, 8), (8, 1)])
def test_state_and_data_come_back_bit_for_bit_on_any_mesh(first, second, tmp_path):
    state, data = make_state(), Counting()
    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, s.sharding), state, wanted_on(mesh_of(first), state)
    )
    for _ in range(7):
        next(data)
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(3, placed, data, {"config": {"lr": 0.1}})
    rest = [next(data) for _ in range(5)]
    saved.close()

    again = Checkpoints(tmp_path, keep=2)
    wanted = wanted_on(mesh_of(second), state)
    fresh = Counting()
    assert again.latest == 3 and again.metadata(3) == {"config": {"lr": 0.1}}
    found = again.restore(3, wanted, fresh)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    jax.tree.map(
        lambda x, w: np.testing.assert_equal(x.sharding.is_equivalent_to(w.sharding, x.ndim), True),
        found,
        wanted,
    )
    moments = optax.tree_utils.tree_get(found.optimizer, "mu")
    assert moments["a.w_df"].sharding.spec == found.params["a.w_df"].sharding.spec
    assert [next(fresh) for _ in range(5)] == rest
    again.close()


def test_streams_are_found_whichever_process_saved_them(tmp_path, monkeypatch):
    """Two processes save three streams each; a single process reads all of them."""
    states = {number: {"next": 10 * number, "waiting": [number]} for number in range(6)}
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        mine = {number: states[number] for number in range(3 * process, 3 * process + 3)}
        asyncio.run(in_background(StreamStates(mine).save(Created(tmp_path))))
    found = StreamStates()
    asyncio.run(in_background(found.load(epath.Path(tmp_path))))
    assert found.states == states


@dataclasses.dataclass
class Created:
    """A folder that is there already, where Orbax has one that is being made."""

    path: pathlib.Path

    async def await_creation(self):
        return epath.Path(self.path)


async def in_background(started):
    """Waits for the first half of a save or a load, which starts it, and for the second."""
    await (await started)


def test_the_state_may_change_as_soon_as_save_returns(tmp_path):
    """The next train step is given the buffers of the state and overwrites them."""
    saved = Checkpoints(tmp_path, keep=1)
    state = jax.tree.map(jnp.copy, make_state((512, 512)))
    kept = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    saved.save(3, state, Counting(), {})
    jax.block_until_ready(overwrite(state))
    saved.close()
    again = Checkpoints(tmp_path, keep=1)
    found = again.restore(3, wanted_on(mesh_of(1), kept), None)
    jax.tree.map(np.testing.assert_array_equal, found, kept)
    again.close()


def test_the_last_checkpoints_are_kept(tmp_path):
    saved = Checkpoints(tmp_path, keep=2)
    assert saved.latest is None
    for step in (2, 4, 6, 8):
        saved.save(step, make_state(step=step), Counting(), {"step": step})
    saved.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["6", "8"]
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest == 8 and again.metadata(6) == {"step": 6}
    again.close()


def test_half_a_checkpoint_does_not_count(tmp_path):
    """A process killed while it saves leaves a folder under a temporary name."""
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(2, make_state(), Counting(), {})
    saved.close()
    (tmp_path / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest == 2
    again.save(4, make_state(step=4), Counting(), {})
    again.close()
    final = Checkpoints(tmp_path, keep=2)
    assert final.latest == 4
    final.close()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda p: {**p, "a.w_df": jnp.zeros((8, 32))},
            r"a\.w_df: checkpoint \(8, 16\), configuration \(8, 32\)$",
        ),
        (lambda p: {"a.w_df": p["a.w_df"]}, r"b\.scale_d: checkpoint \(8,\), configuration None$"),
        (
            lambda p: {**p, "b.bias_d": jnp.zeros(8)},
            r"b\.bias_d: checkpoint None, configuration \(8,\)$",
        ),
    ],
)
def test_another_models_checkpoint_is_refused(change, message, tmp_path):
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(2, make_state(), Counting(), {})
    saved.close()
    saved = Checkpoints(tmp_path, keep=2)
    other = change(make_state().params)
    with pytest.raises(
        ConfigError, match=r"/2 holds another model; use another --workdir .*: " + message
    ):
        saved.restore(2, jax.eval_shape(lambda: new_state(other, OPTIMIZER)), None)
    saved.close()


def truncate_files(step: pathlib.Path) -> None:
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_files(step: pathlib.Path) -> None:
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def zero_arrays(step: pathlib.Path) -> None:
    for path in (step / "state").rglob("d/*"):
        path.write_bytes(bytes(path.stat().st_size))


def empty_folder(step: pathlib.Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


BREAKS = {
    "truncated files": truncate_files,
    "empty files": empty_files,
    "arrays of zeros": zero_arrays,
    "empty folder": empty_folder,
    "no metadata": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "no position of the data": lambda step: shutil.rmtree(step / "data"),
    "half a position of the data": lambda step: truncate_files(step / "data"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_newest_checkpoint_is_one_line_and_the_one_before_is_taken(name, tmp_path, caplog):
    """The broken one is kept aside, so that its step can be saved again."""
    saved = Checkpoints(tmp_path, keep=2)
    data = Counting()
    for step in (2, 4):
        next(data)
        saved.save(step, make_state(step=step), data, {"step": step})
    saved.close()
    BREAKS[name](tmp_path / "4")

    saved = Checkpoints(tmp_path, keep=2)
    found = Counting()
    seen = []
    with caplog.at_level(logging.WARNING):
        restored = saved.restore_newest(wanted_on(mesh_of(1), make_state()), found, seen.append)
    assert restored is not None
    step, state = restored
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step=2))
    assert {"step": 2} in seen
    (line,) = [record.getMessage() for record in caplog.records]
    assert "\n" not in line
    assert f"{tmp_path}/4 cannot be read (" in line
    assert line.endswith("The checkpoint of step 2 is taken.")
    assert (tmp_path / "4.unreadable").is_dir()
    next(found)
    saved.save(4, make_state(step=4), found, {"step": 4})
    saved.close()
    again = Checkpoints(tmp_path, keep=2)
    assert again.steps == [4, 2]
    again.close()


def test_if_no_checkpoint_can_be_read_the_run_does_not_start_afresh(tmp_path):
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(2, make_state(), Counting(), {"step": 2})
    saved.close()
    truncate_files(tmp_path / "2")
    again = Checkpoints(tmp_path, keep=2)
    with pytest.raises(
        ConfigError, match=r"/2 cannot be read \(.*\): expected a complete"
    ) as error:
        again.restore_newest(wanted_on(mesh_of(1), make_state()), Counting(), lambda _: None)
    assert "\n" not in str(error.value)
    again.close()


def test_looking_for_checkpoints_makes_no_folder(tmp_path):
    saved = Checkpoints(tmp_path / "none", keep=2)
    assert saved.latest is None and saved.newest() is None
    saved.close()
    assert not (tmp_path / "none").exists()
