"""Memory that is freed stays with the process, so that the next step does not fault it in again."""

import subprocess
import sys

import pytest

SIZE = 100 * 2**20  # bytes; glibc maps anything above 32 MiB anew, whatever its thresholds are
PAGE = 4096
PROGRAM = f"""
import resource, threading
from mod_jax.training.allocator import keep_freed_memory

size = {SIZE}

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def in_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(faults()))
    thread.start()
    thread.join()
    return found[0]

before = [faults(), faults()]
keep_freed_memory()
faults()
print(*before, faults(), in_thread())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another one")
def test_a_large_buffer_is_faulted_in_once():
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    *without, kept, in_thread = map(int, run.stdout.split())
    if min(without) < SIZE // PAGE:
        pytest.skip("pages are huge, or the allocator is another one")
    assert max(kept, in_thread) < SIZE // PAGE // 10
