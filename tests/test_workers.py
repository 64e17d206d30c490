"""Worker processes: what they read is what threads read; one that is killed stops the run; none outlives it."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys

import grain
import numpy as np
import psutil
import pytest
from PIL import Image

from mod_jax.batch import Batch
from mod_jax.config import DataConfig, ModelConfig, SourceConfig, VisionConfig
from mod_jax.data.batches.pipeline import Batches
from mod_jax.data.batches.workers import WorkerDied, in_process
from mod_jax.data.samples.tokenizer import scenes_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
TOKENIZER = scenes_tokenizer()
MODEL = ModelConfig(
    VisionConfig(
        image_size=24, patch_size=12, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2
    ),
    image_token_id=1,
    end_token_id=0,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Chats about pictures, one of which is not there; one question would forge a special token."""
    folder, rng = tmp_path_factory.mktemp("chats"), np.random.default_rng(0)
    for number in set(range(20)) - {7}:
        Image.fromarray(rng.integers(0, 256, (30, 20 + number, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
    asked = lambda i: "<image> how many?" + " <|endoftext|>" * (i == 3)
    turns = lambda i: [
        {"from": "human", "value": asked(i)},
        {"from": "gpt", "value": "one " * (1 + i % 5)},
    ]
    (folder / "chats.json").write_text(
        json.dumps(
            [{"id": f"r{i}", "image": f"{i}.png", "conversations": turns(i)} for i in range(20)]
        )
    )
    source = SourceConfig("chat", str(folder / "chats.json"), str(folder))
    return DataConfig(
        (source,),
        sequence_length=40,
        images_per_row=2,
        samples_per_row=2,
        template="brief",
        look_ahead=6,
        max_bad_share=0.1,
    )


def make(config, workers) -> Batches:
    return Batches(dataclasses.replace(config, workers=workers), TOKENIZER, MODEL, rows=4)


def assert_equal(a: Batch, b: Batch):
    for field in dataclasses.fields(Batch):
        np.testing.assert_array_equal(
            getattr(a, field.name), getattr(b, field.name), err_msg=field.name
        )


def test_processes_read_what_threads_read_and_a_killed_one_stops_the_run(config):
    threads, processes = make(config, 0), make(config, 2)
    for _ in range(4):
        assert_equal(next(processes), next(threads))
    assert processes.get_state() == threads.get_state()
    assert processes.skips.total == threads.skips.total and processes.skips.total.bad == 1
    processes.set_state(threads.get_state())
    assert_equal(next(processes), next(threads))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(
        WorkerDied, match="One of the data.workers = 2 processes has ended: it was killed"
    ):
        list(itertools.islice(processes, 1000))
    for batches in (threads, processes):
        batches.close()
    assert not multiprocessing.active_children()


@dataclasses.dataclass
class Breaks:
    """Pickles, and cannot be unpickled."""

    def __reduce__(self):
        return int, ("no number",)

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return index


def test_workers_that_cannot_begin_stop_the_run():
    numbers = grain.MapDataset.source(Breaks()).to_iter_dataset()
    with pytest.raises(ValueError, match="no number"):
        next(iter(in_process(numbers, 1)))


@pytest.mark.parametrize("workers, processes", [(1, 1), (3, 3), (9, 4)])
def test_streams_are_dealt_to_the_workers(config, workers, processes):
    """No worker goes without a stream; here there are four."""
    alone, dealt = make(config, 0), make(config, workers)
    for _ in range(2):
        assert_equal(next(dealt), next(alone))
    assert len(multiprocessing.active_children()) == processes
    dealt.close()
    alone.close()


SCRIPT = """
import multiprocessing, time
import grain
from mod_jax.data.batches.workers import in_process

if __name__ == "__main__":
    numbers = iter(in_process(grain.MapDataset.range(9).to_iter_dataset(), 1))
    next(numbers)
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(600)
"""


def test_workers_end_with_the_process_they_work_for(tmp_path):
    """Also if that is killed."""
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process.stdout as out:
        worker = psutil.Process(int(out.readline()))
    assert worker.is_running()
    process.kill()
    process.wait()
    worker.wait(timeout=20)
