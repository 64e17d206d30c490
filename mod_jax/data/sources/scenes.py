"""The built-in set as a source of records."""

import pathlib

from mod_jax.config import SourceConfig
from mod_jax.data.scenes.builder import load_scenes, read_turns
from mod_jax.data.sources.array_record import read_stored
from mod_jax.data.sources.record import Record


class ScenesSource:
    """Random access to a split of the built-in set."""

    def __init__(self, config: SourceConfig):
        self._records, self._folder = (
            load_scenes(config.path, config.split),
            pathlib.Path(config.path),
        )

    def __len__(self) -> int:
        return len(self._records)

    def name(self, number: int) -> str:
        """The record's id; its number where it cannot be read."""
        try:
            return read_stored(self._records, number, self._folder)["id"].decode()
        except ValueError:  # BadSample, or ConfigError
            return str(number)

    def __getitem__(self, number: int) -> Record:
        fields = read_stored(self._records, number, self._folder)
        turns = tuple((question, answer) for _, question, answer in read_turns(fields["turns"]))
        return Record(fields["id"].decode(), (fields["image"],), turns, fields["rejected"].decode())
