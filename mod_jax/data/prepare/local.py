"""Prepares a source on one machine, in a pool of worker processes; a task is one shard.

The pool is the standard library's and not Grain's: shards go to whichever worker is free, records
are counted while a shard is being written, and a stop need not wait for the shard's end.
"""

import ctypes
import functools
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from mod_jax.config import ConfigError
from mod_jax.data.prepare.plan import AGAIN, Plan, check_bad_share, finished
from mod_jax.data.prepare.shard import write_shard
from mod_jax.data.sources.kinds import Source
from mod_jax.data.workers import begin_worker, kill_workers

TICK = 0.2  # seconds between two updates of the progress

_write: Callable[[int], dict]  # shard -> report; set in each worker process by its initializer


def _begin(source: Source, plan: Plan, progress: ctypes.Array) -> None:
    """Initializes a worker process."""
    global _write
    begin_worker()
    _write = functools.partial(_write_and_tell, source, plan, progress)


def _write_and_tell(source: Source, plan: Plan, progress: ctypes.Array, shard: int) -> dict:
    return write_shard(source, plan, shard, functools.partial(progress.__setitem__, shard))


def _task(shard: int) -> dict:
    return _write(shard)


def write_shards(
    source: Source,
    plan: Plan,
    workers: int,
    max_bad_share: float,
    on_progress: Callable[[int], None],
) -> None:
    """Writes all unfinished shards. Its worker processes have ended when it returns or raises.

    Args:
      source: The open source of the plan.
      plan: What to prepare.
      workers: Number of processes.
      max_bad_share: See `check_bad_share`.
      on_progress: Called repeatedly with the number of records read so far.
    Raises:
      ConfigError: If a shard or `check_bad_share` raises it, or a worker process was killed.
    """
    reports = finished(plan)
    context = multiprocessing.get_context("spawn")
    progress = context.RawArray(
        ctypes.c_int64,
        [plan.size(shard) if shard in reports else 0 for shard in range(plan.shards)],
    )
    with ProcessPoolExecutor(workers, context, _begin, (source, plan, progress)) as pool:
        try:
            pending = _submit(pool, [shard for shard in range(plan.shards) if shard not in reports])
            while pending:
                for task in wait(pending, TICK, FIRST_COMPLETED).done:
                    reports[pending.pop(task)] = task.result()
                check_bad_share(plan, reports.values(), max_bad_share)
                on_progress(sum(progress))
        except BrokenProcessPool:
            raise ConfigError(
                f"--workers = {workers}: expected all processes to survive; one was killed "
                f"(out of memory?). Use fewer workers. {AGAIN}"
            ) from None
        except BaseException:
            kill_workers()  # a shard takes minutes, and its worker would finish it first
            raise


def _submit(pool: ProcessPoolExecutor, shards: list[int]) -> dict[Future, int]:
    # Worker processes start here and inherit this mask, so that ctrl-C interrupts this process
    # alone even before they ignore it themselves.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return {pool.submit(_task, shard): shard for shard in shards}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
