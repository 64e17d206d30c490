"""Preparing on one machine: a pool of worker processes, a shard a task."""

import ctypes
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from mod_jax.config import ConfigError
from mod_jax.data.prepare.plan import AGAIN, Plan, finished, judge
from mod_jax.data.prepare.shard import write_shard
from mod_jax.data.sources.kinds import Source

TICK = 0.2  # seconds between two looks at the progress

_write: Callable[[int], dict]  # of a worker process, shard -> report


def _begin(source: Source, plan: Plan, progress: ctypes.Array, leash: Connection) -> None:
    """Makes a process a worker."""
    global _write
    _write = functools.partial(_write_and_tell, source, plan, progress)
    threading.Thread(target=_follow, args=(leash,), daemon=True).start()


def _follow(leash: Connection) -> None:
    """Ends this process as soon as the pipe's other end is closed, also by the death of its holder."""
    leash.poll(None)
    os._exit(1)


def _write_and_tell(source: Source, plan: Plan, progress: ctypes.Array, shard: int) -> dict:
    return write_shard(source, plan, shard, functools.partial(progress.__setitem__, shard))


def _task(shard: int) -> dict:
    return _write(shard)


def write_shards(
    source: Source, plan: Plan, workers: int, max_bad_share: float, tell: Callable[[int], None]
) -> None:
    """Writes the shards that are not finished. When this ends, in whatever way, its processes have ended.

    Args:
      source: the plan's, open.
      plan: what is prepared.
      workers: processes.
      max_bad_share: see `judge`.
      tell: is told the number of records that were read, again and again.
    Raises:
      ConfigError: from a shard or the judge, or if a process was killed.
    """
    reports = finished(plan)
    context = multiprocessing.get_context("spawn")
    progress = context.RawArray(
        ctypes.c_int64,
        [len(plan.numbers(shard)) if shard in reports else 0 for shard in range(plan.shards)],
    )
    leash, hold = context.Pipe(duplex=False)
    with (
        ProcessPoolExecutor(workers, context, _begin, (source, plan, progress, leash)) as pool,
        hold,
    ):
        mask = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGINT}
        )  # which the workers inherit: ctrl-C is for this process alone
        try:
            pending = {
                pool.submit(_task, shard): shard
                for shard in range(plan.shards)
                if shard not in reports
            }
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while pending:
            for task in wait(pending, TICK, FIRST_COMPLETED).done:
                try:
                    reports[pending.pop(task)] = task.result()
                except BrokenProcessPool:
                    raise ConfigError(
                        f"--workers = {workers}: expected processes that live; one was killed (out of memory?). {AGAIN}"
                    ) from None
            judge(plan, reports.values(), max_bad_share)
            tell(sum(progress))
