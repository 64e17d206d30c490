"""How many bad records are too many: one rule for training, `prepare` and `--dry-run`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# What is less probable than this is no accident.
ACCIDENT = 1e-9
HALVINGS = 50  # of the interval in which a share is searched


class Read(NamedTuple):
    """What has been read of a source so far.

    Attributes:
      bad: Number of bad records among those seen.
      seen: Number of records seen.
      records: Number of all records of the source.
      repeated: Whether some of those seen may be the same record.
    """

    bad: int
    seen: int
    records: int
    repeated: bool = False


def too_many(sources: Sequence[Read], limit: float) -> bool:
    """Whether the records of all sources together hold too many bad ones.

    They do if more than the allowed share of them is bad, or if all are. One bad record of 40 is
    too many at 1 %. A set that is still being read, in random order, is refused as soon as it is
    certain that it holds too many, be it by counting or by chance (`least_bad`). So a large set is
    refused early, and a set that keeps to the limit is never refused for the order in which it is
    read, or for the weights with which its sources are mixed.

    Args:
      sources: What has been read of each source.
      limit: The allowed share of bad records.
    """
    records = sum(source.records for source in sources)
    least = sum(map(least_bad, sources))
    return least / records > limit or least > records - 1


def least_bad(source: Read) -> float:
    """Returns the smallest number of bad records that a source as a whole can hold.

    These are the bad ones that were seen, or more: if it held fewer than the returned number, so
    many among those seen would be less probable than ACCIDENT.
    """
    if not source.bad:
        return 0.0
    certain = 0 if source.repeated else source.bad
    return max(certain, _least_share(source) * source.records)


def _least_share(source: Read) -> float:
    """Returns the smallest share of bad records that explains those seen.

    It solves Chernoff's bound for the binomial distribution, which also holds for drawing without
    replacement (Hoeffding 1963, section 6).
    """
    too_low, found = 0.0, source.bad / source.seen
    for _ in range(HALVINGS):
        middle = (too_low + found) / 2
        if not middle:
            break
        if _improbability(source, middle) > -math.log(ACCIDENT):
            too_low = middle
        else:
            found = middle
    return found


def _improbability(source: Read, share: float) -> float:
    """Returns x, where seeing so many bad records has a probability of at most exp(-x).

    `share` is the share of the source that is bad, which is smaller than that of the records seen.
    """
    seen = source.bad / source.seen
    divergence = seen * math.log(seen / share)
    if seen < 1:
        divergence += (1 - seen) * math.log((1 - seen) / (1 - share))
    return source.seen * divergence
