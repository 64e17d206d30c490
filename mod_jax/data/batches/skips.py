"""Bad records: each is logged by name and counted, and too many of them stop the run."""

import collections
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mod_jax.data.batches.streams import Counts, Row, counts_of
from mod_jax.data.samples.bad_share import Read, too_many
from mod_jax.data.sources.kinds import Source

log = logging.getLogger(__name__)


class TooManyBadSamples(RuntimeError):
    """More records are bad than `data.max_bad_share` allows."""


class Skips:
    """Judges the bad records that this process's streams have read, and counts unused keys.

    Args:
      max_bad_share: Share of bad records above which the run stops.
      sources: The sources of the streams.
      states: State of each stream, by number. The owner keeps it up to date.
    """

    def __init__(
        self,
        max_bad_share: float,
        sources: Sequence[Source],
        states: Mapping[int, dict[str, Any]],
    ):
        self._limit = max_bad_share
        self._sources = sources
        self._last: collections.deque[str] = collections.deque(maxlen=5)
        self._named: set[int] = set()
        self._states = states

    @property
    def by_source(self) -> list[Counts]:
        """The counts of each source, summed over this process's streams."""
        return list(map(Counts.sum, zip(*map(counts_of, self._states.values()))))

    @property
    def total(self) -> Counts:
        """The sum of `by_source`."""
        return Counts.sum(self.by_source)

    def note(self, row: Row) -> None:
        """Logs the bad records that a stream read before a row, and judges their share.

        Raises:
          TooManyBadSamples: If the share of bad records exceeds the limit. Records are counted in
            their first epoch; in a later one, the stream's last records show it, which were all
            bad. That happens if pictures vanish.
        """
        for skipped in row.skipped:
            self._last.append(str(skipped))
            if skipped.number not in self._named:
                self._named.add(skipped.number)
                log.warning("skipped %s", skipped)
        self.judge([(counts.bad, counts.seen) for counts in self.by_source])
        run = [
            Read(bad, bad, len(source), repeated=True)
            for bad, source in zip(row.bad_run, self._sources)
        ]
        if not row.samples and too_many(run, self._limit):
            self._stop(f"The last {sum(row.bad_run)} samples are all bad")

    def judge(self, read: Sequence[tuple[int, int]]) -> None:
        """Judges the share of bad records.

        Args:
          read: (bad records, records seen) of each source, of this process or of all.
        Raises:
          TooManyBadSamples: If it exceeds the limit.
        """
        counted = [Read(*numbers, len(source)) for numbers, source in zip(read, self._sources)]
        if too_many(counted, self._limit):
            bad, seen = map(sum, zip(*read))
            records = sum(map(len, self._sources))
            self._stop(f"{bad} of {seen} records are bad, where all are {records}")

    def unused_keys(self) -> list[str]:
        """Returns a line for each source whose records have keys that training does not use."""
        lines = (
            counts.unused.line(source.title, counts.seen - counts.bad)
            for source, counts in zip(self._sources, self.by_source)
        )
        return [line for line in lines if line]

    def _stop(self, what: str) -> NoReturn:
        raise TooManyBadSamples(
            f"{what}, more than data.max_bad_share = {self._limit} allows. Repair the data "
            "(--dry-run names all bad records), or allow a larger share. The last bad records: "
            f"{'; '.join(self._last)}."
        )
