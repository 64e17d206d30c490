"""A local file that any thread or process can read at any offset, and that must not change."""

import functools
import os
import pathlib
from io import FileIO

from mod_jax.config import require


class LocalFile:
    """A file that each process opens at its first read and then keeps open.

    Pickles as its path, size and modification time, so that another process can verify that it
    reads the same file.
    """

    def __init__(self, path: pathlib.Path, key: str):
        """Records the identity of the file.

        Args:
          path: Path of an existing file.
          key: Configuration key that names the file, for error messages.
        """
        self.path = path
        self._key = key
        self._identity = _identity(path)

    def verify(self) -> None:
        """Checks that the path still leads to the same file; offsets into another one are wrong.

        Raises:
          ConfigError: If the file was removed or modified.
        """
        same = self.path.is_file() and _identity(self.path) == self._identity
        require(
            same,
            self._key,
            str(self.path),
            "the file that existed when the source was opened",
            "It was removed or changed; start again.",
        )

    @functools.cached_property
    def opened(self) -> FileIO:
        """The open file. It is verified when it is opened."""
        self.verify()
        return FileIO(self.path)

    def read(self, start: int, length: int) -> bytes:
        """Reads `length` bytes from byte `start` on; fewer at the end of the file."""
        # Hold a reference during the read. If two threads open the file at the same time, one of
        # the two file objects is dropped, and it is closed as soon as nothing refers to it.
        file = self.opened
        return os.pread(file.fileno(), length, start)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "opened"}


def _identity(path: pathlib.Path) -> tuple[int, int]:
    """Returns the size in bytes and the modification time in ns."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
