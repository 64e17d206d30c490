"""The places where sources find the pictures that their records name: folders, buckets, archives.

Every place can be read by name, from any thread and process.
"""

import functools
import pathlib
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Protocol

from etils import epath

from mod_jax.config import ConfigError, require
from mod_jax.data.sources.local_file import LocalFile
from mod_jax.data.sources.record import BadSample

KEY = "data.sources.images"
BUCKET = "gs://"
TAR_END = bytes(1024)  # a tar ends with two blocks of zeros
LARGEST = 1 << 28  # bytes; a member of a zip that claims to be larger is not unpacked
FOLDER_AT_OPENING = "the folder that existed when the source was opened"
BRING_BACK = "It was removed or unmounted; bring it back."


class Pictures(Protocol):
    """A place of pictures, read by name."""

    def __getitem__(self, name: str) -> bytes | pathlib.Path:
        """Returns the encoded bytes of a picture, or the path of a local file.

        The local file may be missing.

        Raises:
          BadSample: If the name leads out of the place, or no picture has this name.
          ConfigError: If the place itself no longer exists.
        """


def open_pictures(place: str) -> Pictures:
    """Opens a place of pictures.

    Args:
      place: A folder, a folder of a bucket (gs://), or an archive (.zip or .tar). Empty if the
        records have no pictures.
    Raises:
      ConfigError: If the place does not exist or is of another kind.
    """
    if not place:
        return NoPictures()
    if place.startswith(BUCKET):
        return BucketPictures(place)
    path = pathlib.Path(place)
    if path.is_dir():
        return FolderPictures(path)
    require(
        path.is_file(),
        KEY,
        place,
        "an existing folder, a folder of a bucket (gs://), or an archive",
    )
    require(
        path.suffix in ARCHIVES,
        KEY,
        place,
        f"an archive of {' or '.join(ARCHIVES)}",
        "A compressed tar does not allow random access: unpack it.",
    )
    return ARCHIVES[path.suffix](path)


def _inside(name: str) -> str:
    """Returns the normalised name.

    Raises:
      BadSample: If it leads out of its folder.
    """
    plain = posixpath.normpath(name)
    if plain.startswith(("/", "../")) or plain == "..":
        raise BadSample(f"picture outside of {KEY}: {name!r}")
    return plain


class NoPictures:
    """The place of a source without pictures. A record that names a picture is bad."""

    def __getitem__(self, name: str) -> bytes:
        raise BadSample(f"picture {name!r}, but no {KEY} to find it in")


class FolderPictures:
    """Files of a local folder, as paths."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def __getitem__(self, name: str) -> pathlib.Path:
        # A lost mount must stop the run. Without this check every record would be bad instead.
        require(self._folder.is_dir(), KEY, str(self._folder), FOLDER_AT_OPENING, BRING_BACK)
        return self._folder / _inside(name)


class BucketPictures:
    """Objects of a bucket under a prefix."""

    def __init__(self, place: str):
        self._place = place
        require(epath.Path(place).is_dir(), KEY, place, "an existing folder of a bucket")

    def __getitem__(self, name: str) -> bytes:
        folder = epath.Path(self._place)
        try:
            return (folder / _inside(name)).read_bytes()
        except FileNotFoundError:
            require(folder.is_dir(), KEY, self._place, FOLDER_AT_OPENING, BRING_BACK)
            raise BadSample(f"no such picture: {folder / name}") from None


class TarPictures:
    """Members of a tar.

    The offsets of all members are indexed once, at opening, and pickled with the object.
    """

    def __init__(self, path: pathlib.Path):
        self._file = LocalFile(path, KEY)
        try:
            with tarfile.open(path, "r:") as archive:
                self._members = {
                    posixpath.normpath(member.name): (member.offset_data, member.size)
                    for member in archive
                    if member.isreg()
                }
                end = archive.offset
        except tarfile.TarError as error:
            raise ConfigError(
                f"{KEY} = {str(path)!r}: expected a whole tar, uncompressed ({error})."
            ) from None
        # tarfile takes a truncated or corrupt header for the end of the archive.
        require(
            self._file.read(end, len(TAR_END)) == TAR_END,
            KEY,
            str(path),
            f"a whole tar; it breaks off at byte {end}, after {len(self._members)} files",
        )

    def __getitem__(self, name: str) -> bytes:
        member = self._members.get(_inside(name))
        if member is None:
            raise BadSample(f"no such picture in {self._file.path}: {name}")
        start, size = member
        return self._file.read(start, size)


class ZipPictures:
    """Members of a zip.

    Each process reads the archive's directory once, which takes about a second for 100,000 members.
    """

    def __init__(self, path: pathlib.Path):
        self._file = LocalFile(path, KEY)
        try:
            members = len(self._archive.filelist)
        except zipfile.BadZipFile as error:
            raise ConfigError(f"{KEY} = {str(path)!r}: expected a whole zip ({error}).") from None
        require(members > 0, KEY, str(path), "an archive with pictures; it is empty")

    @functools.cached_property
    def _archive(self) -> zipfile.ZipFile:
        # Pass an open file, which ZipFile never closes. A file that ZipFile opens itself is closed
        # by a count of its readers, and that count is not thread-safe.
        return zipfile.ZipFile(self._file.opened)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_archive"}

    def __getitem__(self, name: str) -> bytes:
        try:
            member = self._archive.getinfo(_inside(name))
            if member.file_size > LARGEST:
                size = member.file_size
                raise BadSample(f"picture of more than {LARGEST} bytes: {name} ({size})")
            return self._archive.read(member)
        except KeyError:
            raise BadSample(f"no such picture in {self._file.path}: {name}") from None
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise BadSample(f"unreadable in {self._file.path}: {name} ({error})") from None


ARCHIVES: dict[str, Callable[[pathlib.Path], Pictures]] = {".zip": ZipPictures, ".tar": TarPictures}
