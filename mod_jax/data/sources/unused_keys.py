"""Counts the keys that carry nothing for training, so that one line says of each source which."""

import dataclasses
from collections.abc import Iterable

from mod_jax.data.sources.record import printable, shortened

MOST_NAMED = 16  # keys; ids that stand as keys would be endless


@dataclasses.dataclass
class UnusedKeys:
    """Keys that the records of a source have and that training does not use; see `keys.unused`.

    Attributes:
      records: Number of records that have such keys.
      keys: The keys, sorted, at most one more than MOST_NAMED.
    """

    records: int = 0
    keys: list[str] = dataclasses.field(default_factory=list)

    def add(self, keys: Iterable[str], records: int = 1) -> None:
        """Counts a record that has these keys, or several."""
        names = set(keys)
        if names:
            self.records += records
            self.keys = sorted({*self.keys, *names})[: MOST_NAMED + 1]

    def line(self, source: str, records: int) -> str:
        """Returns the line for a person; "" if there are no such keys.

        Args:
          source: Name of the source.
          records: Number of records that were read and can be used.
        """
        if not self.keys:
            return ""
        names = [shortened(" ".join(printable(key).split())) for key in self.keys[:MOST_NAMED]]
        if len(self.keys) > MOST_NAMED:
            names.append("...")
        share = f"in {self.records:,} of {records:,} records"
        return f"source {source}: keys not used: {', '.join(names)} ({share})"
