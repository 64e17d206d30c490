"""The built-in set of scenes as a source of records."""

import pathlib
from typing import Any

from mod_jax.data.scenes.builder import load_scenes, read_turns
from mod_jax.data.sources.array_record import index_of_split, read_stored
from mod_jax.data.sources.record import Record


class ScenesSource:
    """Random access to the records of one split of the built-in set."""

    def __init__(self, path: str, split: str):
        """Opens the split; see `load_scenes`.

        Raises:
          ConfigError: If the folder does not hold exactly one prepared set, or has no such split.
        """
        self._folder = pathlib.Path(path)
        records: Any = load_scenes(path, split)
        self._records = records
        self._index = index_of_split(records.dataset_info.splits[split])

    def __len__(self) -> int:
        return len(self._records)

    def index(self) -> bytes:
        """Returns the lengths of the split's shards, and its size in bytes."""
        return self._index

    def name(self, number: int) -> str:
        """Returns the record's id, or its number if it cannot be read."""
        try:
            return read_stored(self._records, number, self._folder)["id"].decode()
        except ValueError:  # BadSample or ConfigError
            return str(number)

    def __getitem__(self, number: int) -> Record:
        fields = read_stored(self._records, number, self._folder)
        turns = tuple((question, answer) for _, question, answer in read_turns(fields["turns"]))
        return Record(fields["id"].decode(), (fields["image"],), turns, fields["rejected"].decode())
