"""Opens a configured source of any kind, and checks each of its records when it is read."""

import contextlib
import functools
import hashlib
from typing import Protocol

from mod_jax.config import SourceConfig
from mod_jax.data.sources.record import (
    BadSample,
    Record,
    check,
    shortened,
    without_pictures,
)


class Records(Protocol):
    """What the class of each kind offers: random access to records, and their names.

    If the configuration says `text_only`, a class may leave the pictures unread. `Source` then
    removes the markers from the questions, together with any pictures that were read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Record:
        """Returns a record, unchecked. Raises the errors that `open_source` describes."""

    def index(self) -> bytes:
        """Returns what tells the data from others: offsets, or lengths of files; not the texts."""

    def name(self, number: int) -> str:
        """Returns the record's id, by which its user finds it. Never raises."""


def _open_json(config: SourceConfig) -> Records:
    from mod_jax.data.sources.json import JsonSource

    images = None if config.text_only else config.images
    return JsonSource(config.path, bool(config.holds_pairs), images)


def _open_rlaif(config: SourceConfig) -> Records:
    from mod_jax.data.sources.parquet import RlaifSource

    return RlaifSource(config.path, None if config.text_only else config.images)


def _open_tfds(config: SourceConfig) -> Records:
    from mod_jax.data.sources.tfds import TfdsSource

    return TfdsSource(config.path, config.split)


def _open_prepared(config: SourceConfig) -> Records:
    from mod_jax.data.sources.prepared import PreparedSource

    return PreparedSource(config.path)


def _open_scenes(config: SourceConfig) -> Records:
    from mod_jax.data.sources.scenes import ScenesSource

    return ScenesSource(config.path, config.split)


# Each function imports its class itself: TFDS and pyarrow are imported only if a kind needs them.
KINDS = {
    "chat": _open_json,
    "preference": _open_json,
    "rlaif": _open_rlaif,
    "tfds": _open_tfds,
    "prepared": _open_prepared,
    "scenes": _open_scenes,
}


def title(config: SourceConfig) -> str:
    """Returns the name of a source in a report: its path, and its split if it has one."""
    return f"{config.path}:{config.split}" if config.split else config.path


class Source:
    """The records of a configured source, checked, and without pictures if `text_only` is set.

    A Grain random-access source (`grain.sources.RandomAccessDataSource`): `len(source)` and
    `source[number]`, with `source.name(number)` beside them. Threads may read it at the same time.
    It pickles small, as paths and offsets; another process opens the files again.
    """

    def __init__(self, config: SourceConfig):
        self._config = config
        self._records = KINDS[config.kind](config)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def title(self) -> str:
        """Its name in a report."""
        return title(self._config)

    @property
    def holds_pairs(self) -> bool:
        """Whether the records are preference pairs.

        If the configuration does not say it, the first good record does.
        """
        if self._config.holds_pairs is not None:
            return self._config.holds_pairs
        for number in range(len(self)):
            with contextlib.suppress(BadSample):
                return self[number].is_pair
        return False

    @functools.cached_property
    def identity(self) -> dict:
        """Number of records, and the SHA-256 of their index, in JSON types.

        A file that grows, shrinks or is replaced by another one changes it; a file that moves does
        not.
        """
        checksum = hashlib.sha256(self._records.index()).hexdigest()
        return {"records": len(self), "checksum": checksum}

    def name(self, number: int) -> str:
        """Returns the record's id, by which its user finds it. Never raises."""
        return shortened(" ".join(self._records.name(number).split()))

    def __getitem__(self, number: int) -> Record:
        number = range(len(self))[number]  # IndexError past the end; a negative one counts from it
        record = self._records[number]
        return check(without_pictures(record) if self._config.text_only else record)


def open_source(config: SourceConfig) -> Source:
    """Opens a source.

    Returns:
      The source. Reading it raises BadSample for a record that cannot be used, and ConfigError if
      the source itself, or the place of its pictures, was removed or replaced after opening.
    Raises:
      ConfigError: If the file, the folder or the prepared set does not exist or has another form.
    """
    return Source(config)
