"""A local file that is read by number of byte, from any thread and process, and stays the file it was."""

import functools
import os
import pathlib
from io import FileIO

from mod_jax.config import require


class LocalFile:
    """A file that is opened when first read, in each process anew, and then kept open. Pickles as its path, size and time of change."""

    def __init__(self, path: pathlib.Path, key: str):
        """Takes an existing file; `key` of the configuration named it."""
        self.path, self._key, self._identity = path, key, _identity(path)

    def verify(self) -> None:
        """Refuses another file of the same name, whose records or members are elsewhere.

        Raises:
          ConfigError: if the file is gone, or was written since.
        """
        same = self.path.is_file() and _identity(self.path) == self._identity
        require(
            same,
            self._key,
            str(self.path),
            "the file that was there at first",
            "It was removed or changed; start again.",
        )

    @functools.cached_property
    def opened(self) -> FileIO:
        """The open file, verified."""
        self.verify()
        return FileIO(self.path)

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from byte `start` on, fewer at the end of the file."""
        file = self.opened  # held while it is read: where two threads open it at once, one of the two is closed when nobody holds it
        return os.pread(file.fileno(), length, start)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "opened"}


def _identity(path: pathlib.Path) -> tuple[int, int]:
    """Bytes, and the time of the last change in ns."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
