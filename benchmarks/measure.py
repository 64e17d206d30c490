"""Time and memory of a repeated call, measured in the same way for every program.

Neither jax nor torch is imported, as each side of a comparison runs in an environment of its own.
"""

import ctypes
import gc
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

GIB = 2**30
BUSY = 0.05  # share of the machine that others may use before a figure is marked


def resident(key: str = "VmRSS") -> float:
    """GiB of this process: "VmRSS" is what is resident, "VmHWM" its peak since `reset_peak`."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(key + ":")]
    return int(line.split()[1]) / 2**20


def reset_peak() -> None:
    """Lets "VmHWM" begin again at what is resident now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def release() -> None:
    """Gives free memory back to the system, so that what is resident is what is held."""
    gc.collect()
    process = ctypes.CDLL(None)
    for name, arguments in (("MallocExtension_ReleaseFreeMemory", ()), ("malloc_trim", (0,))):
        if hasattr(process, name):
            getattr(process, name)(*arguments)


def allocator() -> str:
    """The allocator of this process: "tcmalloc", or "malloc" of the C library."""
    return "tcmalloc" if hasattr(ctypes.CDLL(None), "tc_malloc") else "malloc"


def _busy() -> float:
    """Seconds that all cores of this machine were busy, whoever used them."""
    ticks = list(map(int, pathlib.Path("/proc/stat").read_text().split(maxsplit=9)[1:9]))
    user, nice, system, _, _, *interrupts_and_stolen = ticks
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def repeat(work: Callable[[], object], warmup: int, steps: int) -> dict:
    """Calls `work`, which has to wait for its own results, `warmup` + `steps` times.

    Returns:
      seconds: Median of a call, without the first `warmup`.
      seconds_all: Those of every measured call.
      processor_seconds: Of this process in a call, median.
      peak_gib: The most that was resident during any call, warm-up included, above what was
        resident before the first one.
      resident_gib: What was resident before the first one.
      others: Share of the machine's processors that other processes used meanwhile.
      contended: Whether that is more than BUSY, so that the times are too long.
    """
    release()
    before = resident()
    reset_peak()
    for _ in range(warmup):
        work()
    seconds, processor = [], []
    start = time.perf_counter(), time.process_time(), _busy()
    for _ in range(steps):
        begin, begin_processor = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - begin)
        processor.append(time.process_time() - begin_processor)
    wall, own, busy = (
        now - then for now, then in zip((time.perf_counter(), time.process_time(), _busy()), start)
    )
    others = max(0.0, busy - own) / wall / (os.cpu_count() or 1)
    return {
        "seconds": statistics.median(seconds),
        "seconds_all": seconds,
        "processor_seconds": statistics.median(processor),
        "peak_gib": resident("VmHWM") - before,
        "resident_gib": before,
        "others": others,
        "contended": others > BUSY,
        "allocator": allocator(),
    }


def report(found: dict | Sequence[dict], path: str | pathlib.Path | None) -> None:
    """Prints figures as JSON, with six digits, and writes them to `path` if it is given."""
    text = json.dumps(_rounded(found), indent=1)
    print(text)
    if path:
        pathlib.Path(path).write_text(text + "\n")


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
