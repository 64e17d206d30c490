"""Where a folder is: on a local disk or mount, or in cloud storage."""

import os
import pathlib

from etils import epath


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path names cloud storage, for example gs://bucket/folder."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike) -> epath.Path:
    """Returns a path that does not depend on the current folder, as Orbax requires.

    `epath.Path.absolute` would take gs:// for a relative path too.
    """
    return epath.Path(path if is_remote(path) else pathlib.Path(path).absolute())
