"""Grain's worker processes: how they begin, and how they end with the process they work for."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import grain
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from mod_jax.data.workers import begin_worker

T = TypeVar("T")


class WorkerDied(RuntimeError):
    """A worker process has ended before its work was done."""


def allow_flags() -> None:
    """Lets Grain read its absl flags where no command has parsed any, as in a notebook or a test."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def in_process(dataset: grain.IterDataset[T], buffer: int) -> grain.IterDataset[T]:
    """Returns the dataset's elements, made in a worker process of their own.

    Args:
      dataset: What the process iterates over; it is pickled.
      buffer: Elements that are made ahead.
    """
    allow_flags()
    options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=buffer)
    # Grain starts a process when the first element is asked for. Its own thread asks, so that
    # several processes start at the same time.
    return ThreadPrefetchIterDataset(
        dataset.mp_prefetch(options, begin_worker), prefetch_buffer_size=1
    )


@contextlib.contextmanager
def deaths(workers: int) -> Iterator[None]:
    """Turns Grain's report of a killed worker process into WorkerDied, with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise WorkerDied(
            f"One of the data.workers = {workers} processes has ended: it was killed (out of "
            "memory?) or could not begin, and then says why above. The same command continues "
            "the run; fewer workers need less memory."
        ) from None
