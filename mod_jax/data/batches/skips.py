"""Bad records: each is named in the log and counted, and too many of them stop the run."""

import collections
import logging
import math
from collections.abc import Mapping

from mod_jax.data.batches.streams import Counts, Row, counts_of

LEAST_SEEN = 50  # records before anything is judged
ACCIDENT = 1e-9  # a run of bad records less likely than this, at the allowed share, is no accident

log = logging.getLogger(__name__)


class TooManyBadSamples(RuntimeError):
    """More records are bad than `data.max_bad_share` allows."""


def longest_bad_run(max_bad_share: float) -> int:
    """Returns the run of bad records that cannot be an accident, so that a stream gives up.

    It ends a run over a set without a single good record, or whose folder vanishes in a later
    epoch, where no record is counted any more.
    """
    share = min(max_bad_share, 0.99)
    if share == 0:
        return LEAST_SEEN
    return max(LEAST_SEEN, math.floor(math.log(ACCIDENT) / math.log(share)) + 1)


class Skips:
    """Keeps account of the records that this process's streams have read.

    Args:
      max_bad_share: Share of bad records above which the run stops.
      states: Initial state of each stream, by number.
    """

    def __init__(self, max_bad_share: float, states: Mapping[int, dict]):
        self._limit = max_bad_share
        self._give_up_after = longest_bad_run(max_bad_share)
        self._last: collections.deque[str] = collections.deque(maxlen=5)
        self._named: set[int] = set()
        self.restore(states)

    def restore(self, states: Mapping[int, dict]) -> None:
        """Takes over the counts in the states of the streams."""
        self._counts = {number: counts_of(state) for number, state in states.items()}

    @property
    def total(self) -> Counts:
        """Sum of the counts of all streams of this process."""
        counts = self._counts.values()
        return Counts(
            seen=sum(count.seen for count in counts),
            truncated=sum(count.truncated for count in counts),
            bad=sum(count.bad for count in counts),
        )

    def note(self, row: Row) -> None:
        """Names the bad records that a stream met on its way to a row, and judges their share.

        Raises:
          TooManyBadSamples: once the share of bad records passes the limit, or a stream has given
            up because its last records were all bad.
        """
        self._counts[row.stream] = counts_of(row.state)
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

    def _stop(self, what: str) -> None:
        raise TooManyBadSamples(
            f"{what}, more than data.max_bad_share = {self._limit}. Mend the data, or allow a "
            f"larger share. The last: {'; '.join(self._last)}."
        )
