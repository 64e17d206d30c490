"""LLaVA's chats and preference pairs, in a JSON list or in JSON Lines of any size."""

import json
import pathlib

import numpy as np

from mod_jax.config import require
from mod_jax.data.sources import keys
from mod_jax.data.sources.json_offsets import KEY, SEPARATORS, index_records
from mod_jax.data.sources.llava_form import Reader, read_chat, read_pair
from mod_jax.data.sources.local_file import LocalFile
from mod_jax.data.sources.pictures import open_pictures
from mod_jax.data.sources.record import BadSample, Record, printable

MOST_LOOKED_AT = 64  # entries that tell whether a file of chats holds pairs instead


class JsonSource:
    """Random access to the entries of a JSON file.

    `llava_form` describes the entries. A record is parsed when it is read; the source holds 8 bytes
    per record.
    """

    def __init__(self, path: str, holds_pairs: bool, images: str | None):
        """Indexes the file.

        Args:
          path: The JSON file.
          holds_pairs: Whether its entries are preference pairs, not chats.
          images: Where its pictures are (see `open_pictures`). None leaves pictures out: no place
            is opened, and the records keep their markers.
        Raises:
          ConfigError: If the file or the place of the pictures does not exist or has another form,
            or if chats were expected and the entries are pairs.
        """
        file = pathlib.Path(path)
        require(file.is_file(), KEY, path, "an existing JSON file on a local disk or mount")
        self._read: Reader = read_pair if holds_pairs else read_chat
        self._file = LocalFile(file, KEY)
        self._pictures = None if images is None else open_pictures(images)
        self._offsets = index_records(file)
        if not holds_pairs:
            require(
                not self._has_pairs_alone(),
                "data.sources.kind",
                "chat",
                f"'preference' for {path}, which holds pairs of chosen and rejected answers",
                "Set kind = 'preference' (--kind=preference).",
            )

    def _has_pairs_alone(self) -> bool:
        """Whether the entries, of a large file some of all its parts, are preference pairs."""
        looked_at = np.linspace(0, len(self) - 1, min(len(self), MOST_LOOKED_AT)).astype(int)
        return all(map(self._is_pair, looked_at.tolist()))

    def _is_pair(self, number: int) -> bool:
        try:
            return keys.is_pair(self._entry(number))
        except BadSample:
            return False

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def index(self) -> bytes:
        """Returns the offsets of the records in the file."""
        return self._offsets.tobytes()

    def name(self, number: int) -> str:
        """Returns the record's id, or its number if it has none."""
        try:
            return _name(self._entry(number), number)
        except ValueError:  # BadSample or ConfigError
            return str(number)

    def __getitem__(self, number: int) -> Record:
        entry = self._entry(number)
        return self._read(entry, _name(entry, number), self._pictures)

    def _entry(self, number: int) -> dict:
        start, end = self._offsets[number : number + 2].tolist()
        text = self._file.read(start, end - start).strip(SEPARATORS)
        try:
            entry = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise BadSample(f"not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise BadSample("record is not a JSON object")
        return entry


def _name(entry: dict, number: int) -> str:
    name = entry.get("id")
    return printable(number if name is None else name)
