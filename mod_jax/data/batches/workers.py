"""Reading in Grain's worker processes, and the error if one of them dies."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import grain
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from mod_jax.data.workers import begin_worker

T = TypeVar("T")


class WorkerDied(RuntimeError):
    """A worker process ended before its work was done."""


def allow_flags() -> None:
    """Lets Grain read its absl flags even if no command has parsed any, as in a notebook."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class WorkerIterator(Iterator[T]):
    """Iterates over a dataset whose elements are made in a worker process of their own.

    Args:
      dataset: The dataset; it is pickled and sent to the process.
      buffer: Number of elements that are made ahead.
      workers: Number of all worker processes, for the error message.
    """

    def __init__(self, dataset: grain.IterDataset[T], buffer: int, workers: int):
        allow_flags()
        options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=buffer)
        # Grain starts a process when its first element is requested. A thread per process requests
        # it, so that several processes start at the same time.
        self._elements = iter(
            ThreadPrefetchIterDataset(
                dataset.mp_prefetch(options, begin_worker), prefetch_buffer_size=1
            )
        )
        self._workers = workers

    def __next__(self) -> T:
        """Returns the next element.

        Raises:
          WorkerDied: If the process was killed.
        """
        with worker_failures(self._workers):
            return next(self._elements)

    def start_prefetch(self) -> None:
        """Starts the process."""
        self._elements.start_prefetch()

    def close(self) -> None:
        """Stops the process."""
        self._elements.close()


@contextlib.contextmanager
def worker_failures(workers: int) -> Iterator[None]:
    """Turns Grain's error about a killed worker process into WorkerDied, which names the remedy."""
    try:
        yield
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise WorkerDied(
            f"One of the data.workers = {workers} processes has ended: it was killed (out of "
            "memory?), or it could not start, for the reason printed above. The same command "
            "continues the run; fewer workers need less memory."
        ) from None
