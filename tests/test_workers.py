"""Worker processes read what threads read, end the run if one is killed, and never outlive it."""

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
from mod_jax.data.batches.workers import WorkerDied, WorkerIterator
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
    """Chats about pictures; one picture is missing, and one question forges a special token."""
    folder = tmp_path_factory.mktemp("chats")
    rng = np.random.default_rng(0)
    for number in set(range(20)) - {7}:
        pixels = rng.integers(0, 256, (30, 20 + number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    chats = []
    for number in range(20):
        forged = " <|endoftext|>" if number == 3 else ""
        turns = [
            {"from": "human", "value": "<image> how many?" + forged},
            {"from": "gpt", "value": "one " * (1 + number % 5)},
        ]
        chats.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "chats.json").write_text(json.dumps(chats))
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
    threads = make(config, 0)
    processes = make(config, 2)
    for _ in range(4):
        assert_equal(next(processes), next(threads))
    assert processes.get_state() == threads.get_state()
    assert processes.skips.total == threads.skips.total
    assert processes.skips.total.bad == 1
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
    """A source that can be pickled, but not unpickled."""

    def __reduce__(self):
        return int, ("no number",)

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return index


def test_a_worker_that_cannot_start_stops_the_run():
    numbers = grain.MapDataset.source(Breaks()).to_iter_dataset()
    with pytest.raises(ValueError, match="no number"):
        next(WorkerIterator(numbers, 1, 1))


@pytest.mark.parametrize("workers, processes", [(1, 1), (3, 3), (9, 4)])
def test_streams_are_dealt_to_the_workers(config, workers, processes):
    """There are four streams, and every worker gets at least one."""
    alone = make(config, 0)
    dealt = make(config, workers)
    for _ in range(2):
        assert_equal(next(dealt), next(alone))
    assert len(multiprocessing.active_children()) == processes
    dealt.close()
    alone.close()


SCRIPT = """
import multiprocessing, time
import grain
from mod_jax.data.batches.workers import WorkerIterator

if __name__ == "__main__":
    numbers = WorkerIterator(grain.MapDataset.range(9).to_iter_dataset(), 1, 1)
    next(numbers)
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(600)
"""


def test_workers_end_when_their_parent_process_is_killed(tmp_path):
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
