"""Bad records: counted, named, and too many of them."""

import collections
import dataclasses
import logging
from collections.abc import Sequence

from mod_jax.data.samples.sample import Sample, Skipped

LEAST_SEEN = 50  # records before anything is judged
ACCIDENT = (
    1e-9  # a run of bad samples that is less likely, were their share the allowed one, is none
)

log = logging.getLogger(__name__)


class TooManyBadSamples(RuntimeError):
    """More records are bad than `data.max_bad_share` allows."""


@dataclasses.dataclass
class Counts:
    """Records that a stream has read: later epochs count nothing twice."""

    seen: int = 0
    truncated: int = 0
    bad: int = 0


class Skips:
    """What became of the records that this process has read.

    Args:
      max_bad_share: above which a run stops.
      counts: those of its streams.
    """

    def __init__(self, max_bad_share: float, counts: Sequence[Counts]):
        self._limit, self._counts, self._run = max_bad_share, counts, 0
        self._last, self._named = collections.deque(maxlen=5), set()

    @property
    def total(self) -> Counts:
        """Over all streams."""
        return Counts(*(sum(column) for column in zip(*map(dataclasses.astuple, self._counts))))

    def note(self, counts: Counts, first: bool, outcome: Sample | Skipped) -> None:
        """Counts a sample that was read, and names a bad one in the log.

        Args:
          counts: of its stream.
          first: whether it was the record's first visit.
          outcome: what it was.
        Raises:
          TooManyBadSamples: once the share of bad records passes the limit, or so many bad samples follow each other that they cannot be accidents:
            a folder that vanishes in a later epoch, a set without a good record.
        """
        bad = isinstance(outcome, Skipped)
        self._run = self._run + 1 if bad else 0
        if first:
            counts.seen += 1
            counts.bad += bad
            counts.truncated += not bad and outcome.truncated
        if bad:
            self._last.append(str(outcome))
            if outcome.number not in self._named:
                self._named.add(outcome.number)
                log.warning("skipped %s", outcome)
            self._judge()

    def _judge(self) -> None:
        total, what = self.total, ""
        if self._run >= LEAST_SEEN and min(self._limit, 0.99) ** self._run < ACCIDENT:
            what = f"The last {self._run} samples are all bad"
        elif total.seen >= LEAST_SEEN and total.bad > self._limit * total.seen:
            what = f"{total.bad} of {total.seen} records are bad"
        if what:
            raise TooManyBadSamples(
                f"{what}, more than data.max_bad_share = {self._limit}. Mend the data, or allow a larger share. "
                f"The last: {'; '.join(self._last)}."
            )
