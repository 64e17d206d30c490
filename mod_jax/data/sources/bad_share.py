"""How many bad records are too many: one rule for training, `prepare` and `--dry-run`."""

import math

# What is less probable than this is no accident.
ACCIDENT = 1e-9


def too_many(bad: int, seen: int, records: int, limit: float) -> bool:
    """Whether a set of records holds too many bad ones, as far as it has been read.

    A set is refused if more than its allowed share is bad, or if all of it is: one bad record of
    40 is too many at 1 %. While it is read in random order, it is refused as soon as that is
    known: either the bad records so far are too many for the whole set, or so many among those seen
    would be less probable than ACCIDENT if the set as a whole kept to the limit. So a large set
    stops early, a small one too, and a set that keeps to the limit is never refused for the order
    in which it is read. To judge what has been seen alone, as at the end of a run, let `records`
    be `seen`.

    Args:
      bad: Number of bad records seen.
      seen: Number of all records seen.
      records: Number of records of the whole set.
      limit: The allowed share of bad ones.
    """
    if bad > limit * records or bad == records > 0:
        return True
    return _probability_exponent(bad, seen, limit) > -math.log(ACCIDENT)


def _probability_exponent(bad: int, seen: int, limit: float) -> float:
    """Returns x, where so many bad ones among those seen have a probability of at most exp(-x).

    Chernoff's bound for the binomial distribution. It also holds for drawing without replacement
    (Hoeffding 1963, section 6).
    """
    if bad <= limit * seen:
        return 0.0
    share = bad / seen
    good = 1 - share
    exponent = share * math.log(share / limit)
    if good:
        exponent += good * math.log(good / (1 - limit))
    return seen * exponent
