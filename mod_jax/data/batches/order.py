"""Which record comes when: a mixture of shuffled sources that the seed alone decides."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from mod_jax.config import DataConfig


class Visit(NamedTuple):
    """One reading of a record.

    Attributes:
      source: number of the source.
      number: of the record in it.
      first: whether it is in the source's first epoch.
    """

    source: int
    number: int
    first: bool


def _visit(source: int, length: int, index: int, number: int) -> Visit:
    return Visit(source, number, index < length)


def visits(config: DataConfig, lengths: Sequence[int]) -> grain.MapDataset[Visit]:
    """The endless sequence of visits, by number.

    Each source is a new permutation of its records every epoch; sources take turns by their weights.

    Args:
      config: seed and weights.
      lengths: records of each source.
    """
    seeds = np.random.SeedSequence(config.seed).generate_state(
        len(lengths)
    )  # apart, as Grain adds the epoch to them
    sources = [
        grain.MapDataset.range(length)
        .shuffle(seed=int(seed))
        .repeat()
        .map_with_index(functools.partial(_visit, source, length))
        for source, (length, seed) in enumerate(zip(lengths, seeds))
    ]
    return grain.MapDataset.mix(sources, weights=[source.weight for source in config.sources])
