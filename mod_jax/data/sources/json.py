"""LLaVA's chats and preference pairs, as a JSON list or JSON Lines of any size."""

import json
import pathlib

from mod_jax.config import SourceConfig, require
from mod_jax.data.sources.json_offsets import KEY, SEPARATORS, index_records
from mod_jax.data.sources.llava_form import read_chat, read_pair
from mod_jax.data.sources.local_file import LocalFile
from mod_jax.data.sources.pictures import open_pictures
from mod_jax.data.sources.record import BadSample, Record, printable

READERS = {"chat": read_chat, "preference": read_pair}


class JsonSource:
    """Random access to entries {id, image: str | list, ...} (`entries` has the forms). Holds 8 bytes a record; a record is parsed when it is asked for."""

    def __init__(self, config: SourceConfig):
        path = pathlib.Path(config.path)
        require(path.is_file(), KEY, config.path, "an existing JSON file on a local disk or mount")
        self._read, self._file = READERS[config.kind], LocalFile(path, KEY)
        self._pictures = None if config.text_only else open_pictures(config.images)
        self._offsets = index_records(path)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def name(self, number: int) -> str:
        """The record's id, or its number where it has none."""
        try:
            return _name(self._entry(number), number)
        except ValueError:  # BadSample, or ConfigError
            return str(number)

    def __getitem__(self, number: int) -> Record:
        entry = self._entry(number)
        files = self._picture_files(entry)
        turns, rejected = self._read(entry, len(files))
        return Record(
            _name(entry, number), tuple(self._pictures[file] for file in files), turns, rejected
        )

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

    def _picture_files(self, entry: dict) -> list[str]:
        files = entry.get("image") or []
        files = [files] if isinstance(files, str) else files
        if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
            raise BadSample("image is neither a file's name nor a list of them")
        return files if self._pictures is not None else []


def _name(entry: dict, number: int) -> str:
    name = entry.get("id")
    return printable(number if name is None else name)
