"""Reads single array_record records and tells a corrupt record from a folder that is gone."""

import pathlib
from collections.abc import Sequence
from typing import Any

from mod_jax.config import require
from mod_jax.data.sources.record import BadSample


def index_of_split(split: Any) -> bytes:
    """Returns the lengths of the shards of a TFDS split (a SplitInfo), and its size in bytes."""
    return repr((list(split.shard_lengths), split.num_bytes)).encode()


def read_stored(files: Sequence, number: int, folder: pathlib.Path) -> Any:
    """Returns `files[number]`.

    Args:
      files: An open array_record data source.
      number: Number of the record.
      folder: Folder that holds the files.
    Raises:
      BadSample: If the record's bytes are corrupt.
      ConfigError: If the folder no longer exists.
    """
    try:
        return files[number]
    except RuntimeError as error:  # array_record raises it for every kind of failure
        require(
            folder.is_dir(),
            "data.sources.path",
            str(folder),
            "the folder that existed when the source was opened",
            "It was removed or unmounted; bring it back.",
        )
        raise BadSample(f"unreadable record: {error}") from None
