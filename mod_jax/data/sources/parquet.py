"""RLAIF-V's parquet files. A row has a picture, a question and two answers.

The picture is {bytes, path}, as the datasets library writes it. If it has no bytes, its path is
looked for among the pictures of the source.
"""

import collections
import dataclasses
import glob
import itertools
import pathlib
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mod_jax.config import ConfigError, require
from mod_jax.data.sources import keys
from mod_jax.data.sources.llava_form import read_pair
from mod_jax.data.sources.local_file import LocalFile
from mod_jax.data.sources.pictures import open_pictures
from mod_jax.data.sources.record import BadSample, Record, shortened

KEY = "data.sources.path"
TEXTS = ("question", "chosen", "rejected")
ROWS_AT_A_TIME = 32
BUFFER = 1 << 20  # bytes read at a time, so that a row group is streamed and never held in memory


class RlaifSource:
    """Random access to the rows of parquet files.

    Of the columns, those are read that matter by their names (`keys`).

    Parquet is made for sequential reading. Within a row group, reading forward costs nothing extra;
    reading backward starts again at the beginning of the group. Rows in random order therefore cost
    half a row group each: milliseconds if the groups are small (100 rows), a tenth of a second or
    more if a file is one group.

    A process holds a few rows and a column's dictionary or page (at most 1,024 pictures, as pyarrow
    writes them), never a row group. Threads read one at a time.
    """

    def __init__(self, path: str, images: str | None):
        """Reads the metadata of the files.

        Args:
          path: A parquet file, a folder of them, or a glob pattern.
          images: Where the pictures of rows that have only a path are (see `open_pictures`). None
            leaves pictures out: their column is not read, and the records keep their markers.
        Raises:
          ConfigError: If there are no such files, or one is truncated or lacks a column.
        """
        self._files = [LocalFile(file, KEY) for file in _find(path)]
        self._pictures = None if images is None else open_pictures(images)
        needed = [*TEXTS] if images is None else [*TEXTS, "image"]
        columns = [_columns(file.path, needed) for file in self._files]
        # Of each file: the columns that are read, and those that carry nothing.
        self._columns = [
            [name for name in names if name in needed or _is_read(name, images is not None)]
            for names in columns
        ]
        self._unread = [
            tuple(name for name in names if not keys.may_matter(name)) for names in columns
        ]
        rows_of_groups = [_row_groups(file.path) for file in self._files]
        self._groups = [
            (file, group) for file, rows in enumerate(rows_of_groups) for group in range(len(rows))
        ]
        # The row at which each group or file begins; the last entry is the number of rows.
        self._first = np.cumsum([0, *itertools.chain.from_iterable(rows_of_groups)])
        self._first_of_file = np.cumsum([0, *map(sum, rows_of_groups)])
        require(len(self) > 0, KEY, path, "at least one row")
        self._lock = threading.Lock()
        self._reader: _GroupReader | None = None

    def __getstate__(self) -> dict:
        own = ("_lock", "_reader")  # of this process
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _reader=None)

    def __len__(self) -> int:
        return int(self._first[-1])

    def index(self) -> bytes:
        """Returns the first record of every row group, and the size of every file."""
        sizes = np.array([file.path.stat().st_size for file in self._files])
        return self._first.tobytes() + sizes.tobytes()

    def name(self, number: int) -> str:
        """Returns "<file name>:<row in the file>"."""
        file = _part(self._first_of_file, number)
        return f"{self._files[file].path.name}:{number - self._first_of_file[file]}"

    def __getitem__(self, number: int) -> Record:
        try:
            with self._lock:
                row = self._row(number)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadSample(f"unreadable row: {shortened(str(error))}") from None
        record = read_pair(row, self.name(number), self._pictures)
        unread = self._unread[_part(self._first_of_file, number)]
        return dataclasses.replace(record, unused=record.unused + unread)

    def _row(self, number: int) -> dict:
        part = _part(self._first, number)
        row = number - int(self._first[part])
        reader = self._reader
        self._reader = None  # a reader that fails is not used again
        if reader is None or reader.part != part or row < reader.first:
            file, group = self._groups[part]
            self._files[file].verify()
            reader = _GroupReader(part, self._files[file].path, group, self._columns[file])
        fields = reader.row(row)
        self._reader = reader
        return fields


class _GroupReader:
    """Reads a row group forward.

    Keeps the last two stretches of rows, for threads that ask for neighbouring rows in any order.
    """

    def __init__(self, part: int, path: pathlib.Path, group: int, columns: list[str]):
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)
        self._batches = file.iter_batches(
            ROWS_AT_A_TIME, row_groups=[group], columns=columns, use_threads=False
        )
        self._kept = collections.deque([(0, next(self._batches))], maxlen=2)  # (first row, rows)
        self.part = part

    @property
    def first(self) -> int:
        """The first row that is kept."""
        return self._kept[0][0]

    def row(self, number: int) -> dict:
        """Returns a row of the group that is not before `first`."""
        while number >= (end := self._kept[-1][0] + len(self._kept[-1][1])):
            self._kept.append((end, next(self._batches)))
        start, rows = next(kept for kept in reversed(self._kept) if kept[0] <= number)
        return rows.slice(number - start, 1).to_pylist()[0]


def _part(starts: np.ndarray, number: int) -> int:
    """Returns the index of the part that holds row `number`, given the first row of each part."""
    return int(np.searchsorted(starts, number, side="right")) - 1


def _find(path: str) -> list[pathlib.Path]:
    """Returns the file, the folder's parquet files, or those that match a pattern, sorted."""
    if pathlib.Path(path).is_dir():
        files = sorted(pathlib.Path(path).glob("*.parquet"))
    else:
        files = sorted(map(pathlib.Path, glob.glob(path)))
    require(
        len(files) > 0 and all(file.is_file() for file in files),
        KEY,
        path,
        "a parquet file, a folder of them, or a pattern that matches some",
    )
    return files


def _columns(path: pathlib.Path, needed: list[str]) -> list[str]:
    """Returns the names of the columns of a file, which have to include those that are needed.

    The pictures may be in a column of lists, `images`, instead.
    """
    try:
        found = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{KEY} = {str(path)!r}: expected a whole parquet file ({error})."
        ) from None
    missing = set(needed) - set(found)
    if "images" in found:
        missing -= {"image"}
    expected = f"the columns {', '.join(needed)} (or images)"
    require(not missing, KEY, str(path), f"{expected}; it has {', '.join(found)}")
    return found


def _is_read(column: str, with_pictures: bool) -> bool:
    return keys.may_matter(column) and (with_pictures or not keys.is_about_pictures(column))


def _row_groups(path: pathlib.Path) -> list[int]:
    """Returns the number of rows of each row group of a file."""
    metadata = pq.read_metadata(path)
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
