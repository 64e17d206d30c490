"""Where records come from: one table of kinds, all read by number, each record checked."""

import contextlib

from mod_jax.config import SourceConfig
from mod_jax.data.sources.json import JsonSource
from mod_jax.data.sources.parquet import RlaifSource
from mod_jax.data.sources.prepared import PreparedSource
from mod_jax.data.sources.record import BadSample, Record, check, without_pictures
from mod_jax.data.sources.scenes import ScenesSource
from mod_jax.data.sources.tfds import TfdsSource

KINDS = {
    "chat": JsonSource,
    "preference": JsonSource,
    "rlaif": RlaifSource,
    "tfds": TfdsSource,
    "prepared": PreparedSource,
    "scenes": ScenesSource,
}


class Source:
    """The records of a configured source, checked, without pictures where the configuration says so.

    Safe to read from several threads. Pickles small, as paths and offsets: another process opens the files for itself.
    """

    def __init__(self, config: SourceConfig):
        self._config, self._records = config, KINDS[config.kind](config)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def holds_pairs(self) -> bool:
        """Whether the records are preference pairs: the kind says it, or else the first good record."""
        if self._config.holds_pairs is not None:
            return self._config.holds_pairs
        for number in range(len(self)):
            with contextlib.suppress(BadSample):
                return bool(self[number].rejected)
        return False

    def name(self, number: int) -> str:
        """The record's id, by which its user finds it. Never raises."""
        return self._records.name(number)

    def __getitem__(self, number: int) -> Record:
        record = self._records[range(len(self))[number]]
        return check(without_pictures(record) if self._config.text_only else record)


def open_source(config: SourceConfig) -> Source:
    """Opens a source.

    Returns:
      `len(source)`, `source[number] -> Record`, `source.name(number) -> str`. Reading raises BadSample for a record that cannot be used, and
      ConfigError once the source itself, or the place of its pictures, is gone or another one.
    Raises:
      ConfigError: if the file, the folder or the prepared set is not there or is of another form.
    """
    return Source(config)
