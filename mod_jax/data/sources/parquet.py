"""RLAIF-V's own form: parquet files with a picture's bytes, a question and two answers a row."""

import collections
import glob
import pathlib
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mod_jax.config import ConfigError, SourceConfig, require
from mod_jax.data.sources.llava_form import read_pair
from mod_jax.data.sources.local_file import LocalFile
from mod_jax.data.sources.record import BadSample, Record

KEY = "data.sources.path"
TEXTS = ("question", "chosen", "rejected")
ROWS_AT_A_TIME = 32
BUFFER = 1 << 20  # bytes read at a time, so that a row group is streamed and never held


class RlaifSource:
    """Random access to the rows of parquet files with question, chosen, rejected and image {bytes}; other columns are not read.

    Parquet is made to be read in order. Within a row group, going on costs nothing; going back reads the group again from its beginning. So rows in
    random order cost half a row group each: milliseconds where groups are small (100 rows), a tenth of a second and more where a file is one group.
    A process holds some rows and a column's dictionary or page (of 1,024 pictures at most, as pyarrow writes them), no row group. Threads take turns.
    """

    def __init__(self, config: SourceConfig):
        self._files = [LocalFile(path, KEY) for path in _find(config.path)]
        self._columns = [*TEXTS] if config.text_only else [*TEXTS, "image.bytes"]
        rows = [_row_groups(file.path, self._columns) for file in self._files]
        self._groups = [
            (file, group) for file, groups in enumerate(rows) for group in range(len(groups))
        ]
        self._first = np.cumsum(
            [0, *(count for groups in rows for count in groups)]
        )  # row of each group; then the number of rows
        self._first_of_file = np.cumsum([0, *map(sum, rows)])
        require(len(self) > 0, KEY, config.path, "at least one row")
        self._lock, self._reader = threading.Lock(), None

    def __getstate__(self) -> dict:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_lock", "_reader")
        }

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _reader=None)

    def __len__(self) -> int:
        return int(self._first[-1])

    def name(self, number: int) -> str:
        """The file, and the row in it."""
        file = _part(self._first_of_file, number)
        return f"{self._files[file].path.name}:{number - self._first_of_file[file]}"

    def __getitem__(self, number: int) -> Record:
        try:
            with self._lock:
                row = self._row(number)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadSample(f"unreadable row: {error}") from None
        picture = (row.get("image") or {}).get("bytes")
        images = (picture,) if picture else ()
        turns, rejected = read_pair(row, len(images))
        return Record(self.name(number), images, turns, rejected)

    def _row(self, number: int) -> dict:
        part = _part(self._first, number)
        row, reader = number - int(self._first[part]), self._reader
        self._reader = None  # one that fails is not read on
        if reader is None or reader.part != part or row < reader.first:
            file, group = self._groups[part]
            self._files[file].verify()
            reader = _GroupReader(part, self._files[file].path, group, self._columns)
        fields = reader.row(row)
        self._reader = reader
        return fields


class _GroupReader:
    """Reads a row group forward. Keeps two stretches of rows, for threads that ask for neighbours in any order."""

    def __init__(self, part: int, path: pathlib.Path, group: int, columns: list[str]):
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)
        self._batches = file.iter_batches(
            ROWS_AT_A_TIME, row_groups=[group], columns=columns, use_threads=False
        )
        self._kept = collections.deque([(0, next(self._batches))], 2)
        self.part = part

    @property
    def first(self) -> int:
        """The first row that is kept."""
        return self._kept[0][0]

    def row(self, number: int) -> dict:
        while number >= (end := self._kept[-1][0] + len(self._kept[-1][1])):
            self._kept.append((end, next(self._batches)))
        start, rows = next(kept for kept in reversed(self._kept) if kept[0] <= number)
        return rows.slice(number - start, 1).to_pylist()[0]


def _part(starts: np.ndarray, number: int) -> int:
    """Which part, by where the parts start, holds a number."""
    return int(np.searchsorted(starts, number, side="right")) - 1


def _find(path: str) -> list[pathlib.Path]:
    """The file, the folder's parquet files, or those that match a pattern, sorted."""
    files = (
        sorted(pathlib.Path(path).glob("*.parquet"))
        if pathlib.Path(path).is_dir()
        else sorted(map(pathlib.Path, glob.glob(path)))
    )
    require(
        len(files) > 0 and all(file.is_file() for file in files),
        KEY,
        path,
        "a parquet file, a folder of them, or a pattern that names some",
    )
    return files


def _row_groups(path: pathlib.Path, columns: list[str]) -> list[int]:
    """Rows of each row group."""
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{KEY} = {str(path)!r}: expected a whole parquet file ({error})."
        ) from None
    found = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    require(set(columns) <= set(found), KEY, str(path), f"the columns {columns}; it has {found}")
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
