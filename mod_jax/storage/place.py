"""Where a folder is: on a local disk or mount, in cloud storage, or where it was moved to."""

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


def moved(path: str, start: str, folder: pathlib.Path) -> str:
    """Returns where a path is that a folder names, whether or not the two were moved since.

    It is looked for where it was when the folder was made; then beside the folder or above it, at
    the same place in the tree, as both may have been moved together; then from the current folder.

    Args:
      path: A local path, which may be relative; a path in cloud storage or "" is returned as it is.
      start: The current folder when the folder was made; "" if it is not known.
      folder: The folder that names the path.

    Returns:
      The first place where something is; if there is none, where it was.
    """
    if not path or is_remote(path):
        return path
    before = pathlib.Path(start or ".").absolute()
    was = before / path
    places = [was]
    if was.is_relative_to(before):
        relative = was.relative_to(before)
        places += [parent / relative for parent in folder.absolute().parents]
        places.append(relative.absolute())
    return str(next((place for place in places if place.exists()), was))
