"""Bad records: each is logged by name and counted, and too many of them stop the run."""

import collections
import logging
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from mod_jax.data.batches.streams import Counts, Row, counts_of

LEAST_SEEN = 50  # number of records that are read before their share of bad ones is judged
# A run of bad records is no accident if it is less probable than this at the allowed share.
ACCIDENT = 1e-9

log = logging.getLogger(__name__)


class TooManyBadSamples(RuntimeError):
    """More records are bad than `data.max_bad_share` allows."""


def longest_bad_run(max_bad_share: float) -> int:
    """Returns the number of bad records in a row after which a stream gives up.

    So many cannot be an accident. This limit stops the training on a data set without a single
    good record, or if the pictures vanish in a later epoch, in which records are no longer counted.
    """
    share = min(max_bad_share, 0.99)
    if share == 0:
        return LEAST_SEEN
    return max(LEAST_SEEN, math.floor(math.log(ACCIDENT) / math.log(share)) + 1)


class Skips:
    """Judges the bad records that this process's streams have read.

    Args:
      max_bad_share: Share of bad records above which the run stops.
      states: State of each stream, by number. The owner keeps it up to date.
    """

    def __init__(self, max_bad_share: float, states: Mapping[int, dict[str, Any]]):
        self._limit = max_bad_share
        self._give_up_after = longest_bad_run(max_bad_share)
        self._last: collections.deque[str] = collections.deque(maxlen=5)
        self._named: set[int] = set()
        self._states = states

    @property
    def total(self) -> Counts:
        """Sum of the counts of this process's streams."""
        counts = [counts_of(state) for state in self._states.values()]
        return Counts(
            seen=sum(count.seen for count in counts),
            truncated=sum(count.truncated for count in counts),
            bad=sum(count.bad for count in counts),
        )

    def note(self, row: Row) -> None:
        """Logs the bad records that a stream read before a row, and judges their share.

        Raises:
          TooManyBadSamples: If the share of bad records exceeds the limit, or the stream has given
            up because its last records were all bad.
        """
        for skipped in row.skipped:
            self._last.append(str(skipped))
            if skipped.number not in self._named:
                self._named.add(skipped.number)
                log.warning("skipped %s", skipped)
        if row.bad_run >= self._give_up_after:
            self._stop(f"The last {row.bad_run} samples are all bad")
        total = self.total
        if total.seen >= LEAST_SEEN and total.bad > self._limit * total.seen:
            self._stop(f"{total.bad} of {total.seen} records are bad")

    def _stop(self, what: str) -> NoReturn:
        raise TooManyBadSamples(
            f"{what}, more than data.max_bad_share = {self._limit} allows. Repair the data, or "
            f"allow a larger share. The last bad records: {'; '.join(self._last)}."
        )
