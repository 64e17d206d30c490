"""The order of samples: an endless mixture of shuffled sources, determined by the seed alone."""

import functools
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import grain
import numpy as np

from mod_jax.config import DataConfig

T = TypeVar("T")


class Visit(NamedTuple, Generic[T]):
    """One reading of a record.

    Attributes:
      outcome: The element of the source at the record's index, e.g. a sample.
      source: Number of the source.
      first: Whether it is read in the source's first epoch.
    """

    outcome: T
    source: int
    first: bool


def _visit(source: int, length: int, index: int, outcome: T) -> Visit[T]:
    return Visit(outcome, source, index < length)


def visits(
    config: DataConfig, sources: Sequence[grain.sources.RandomAccessDataSource[T]]
) -> grain.MapDataset[Visit[T]]:
    """Returns the endless sequence of visits, as a Grain dataset with random access.

    Each epoch of a source visits its records in a new random order. The sources take turns
    according to their weights.

    Args:
      config: The seed, and the weights of the sources.
      sources: Random-access sources in their configured order, for example `Samples`.
    """
    # Grain adds the number of the epoch to the seed. The sources' seeds are drawn at random, and
    # not counted up, so that no epoch of one source has the seed of another source's epoch.
    seeds = np.random.SeedSequence(config.seed).generate_state(len(sources))
    endless = [
        grain.MapDataset.source(source)
        .shuffle(seed=int(seed))
        .repeat()
        .map_with_index(functools.partial(_visit, number, len(source)))
        for number, (source, seed) in enumerate(zip(sources, seeds))
    ]
    return grain.MapDataset.mix(endless, weights=[source.weight for source in config.sources])
