"""One process at a time writes into a folder; what a killed one left behind is no lock."""

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from mod_jax.config import ConfigError
from mod_jax.storage.lock import NAME, SILENCE, locked


def hold(folder, held) -> None:
    with locked(folder):
        held.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the folder."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, held), daemon=True)
    process.start()
    assert held.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_refused_and_changes_nothing(tmp_path, holder):
    before = (tmp_path / NAME).read_text()
    message = (
        rf"--workdir = '{tmp_path}': expected a folder that no other process writes to, but "
        rf"process {holder.pid} on {socket.gethostname()} \(since 20\d\d-.*\) does\. Wait for it"
    )
    with pytest.raises(ConfigError, match=message) as error, locked(tmp_path):
        pass
    assert "\n" not in str(error.value)
    assert (tmp_path / NAME).read_text() == before


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / NAME).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


def test_a_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            raise ZeroDivisionError
        assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("silent_for, refused", [(SILENCE / 2, True), (2 * SILENCE, False)])
def test_another_hosts_lock_counts_until_it_has_been_silent(silent_for, refused, tmp_path):
    """The system's lock is not shared by every network file system."""
    owner = {"host": "elsewhere", "process": 7, "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / NAME).write_text(json.dumps(owner))
    beat = time.time() - silent_for
    os.utime(tmp_path / NAME, (beat, beat))
    if not refused:
        with locked(tmp_path):
            return
    with pytest.raises(ConfigError, match="process 7 on elsewhere"), locked(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", '{"process": 7}'])
def test_half_a_lock_file_is_no_lock(text, tmp_path):
    (tmp_path / NAME).write_text(text)
    with locked(tmp_path):
        pass
