"""Who reads and decodes: threads of this process, or processes of their own. What is read is the same."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

THREADS = 4  # decoding leaves Python's lock alone, tokenising and copying do not

_work: Callable  # of a worker process


class WorkerDied(RuntimeError):
    """A worker process has ended before its work."""


def _begin(make: Callable[[], Callable]) -> None:
    """Makes a process a worker."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the process that it works for
    threading.Thread(target=_follow, daemon=True).start()
    _work = make()


def _follow() -> None:
    """Ends this process with the one that it works for, also if that is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(*arguments):
    return _work(*arguments)


class Workers:
    """Does work in the background.

    Args:
      make: gives the function that does the work; made once in each process, so it pickles (small).
      processes: how many; 0: threads of this process.
    """

    def __init__(self, make: Callable[[], Callable], processes: int):
        self._processes = processes
        if processes:
            self._call, self._pool = (
                _call,
                ProcessPoolExecutor(
                    processes, multiprocessing.get_context("spawn"), _begin, (make,)
                ),
            )
        else:
            self._call, self._pool = make(), ThreadPoolExecutor(THREADS)

    def submit(self, *arguments) -> Callable[[], object]:
        """Begins work.

        Returns:
          A function that waits for the result. It and `submit` raise WorkerDied.
        """
        with self._alive():
            result = self._pool.submit(self._call, *arguments).result

        def wait():
            with self._alive():
                return result()

        return wait

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            raise WorkerDied(
                f"One of the data.workers = {self._processes} processes has ended: it was killed (out of memory?) or could not begin, "
                "and then says why above. The same command continues the run; fewer workers need less memory."
            ) from None

    def close(self) -> None:
        """Ends the threads or processes; what is not begun yet is dropped."""
        self._pool.shutdown(cancel_futures=True)
