"""Where the pictures that records name are found: a folder, a bucket, or an archive, each read by name from any thread and process."""

import functools
import pathlib
import posixpath
import tarfile
import zipfile
import zlib

from etils import epath

from mod_jax.config import ConfigError, require
from mod_jax.data.sources.local_file import LocalFile
from mod_jax.data.sources.record import BadSample

KEY = "data.sources.images"
BUCKET = "gs://"
TAR_END = bytes(1024)
LARGEST = 1 << 28  # bytes of a picture's file; what an archive claims beyond it is not unpacked


def open_pictures(place: str):
    """Opens the place of pictures.

    Args:
      place: a folder, a folder of a bucket (gs://), or an archive (.zip or .tar); empty where records have no pictures.
    Returns:
      `pictures[name]`: the encoded bytes, or the path of a local file, which may be missing. Raises BadSample for a name that leaves the place
      or is not there, and ConfigError once the place itself has vanished.
    Raises:
      ConfigError: if the place is not there, or of another kind.
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
    archive = ARCHIVES.get(path.suffix)
    require(
        archive is not None,
        KEY,
        place,
        f"an archive of {' or '.join(ARCHIVES)}",
        "A compressed tar cannot be read by number: unpack it.",
    )
    return archive(path)


def _inside(name: str) -> str:
    """The name in its plainest form.

    Raises:
      BadSample: if it leaves its folder.
    """
    plain = posixpath.normpath(name)
    if plain.startswith(("/", "../")) or plain == "..":
        raise BadSample(f"picture outside of {KEY}: {name!r}")
    return plain


class NoPictures:
    """No place at all."""

    def __getitem__(self, name: str):
        raise BadSample(f"picture {name!r}, but no {KEY} to find it in")


class FolderPictures:
    """Files of a local folder, as paths."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def __getitem__(self, name: str) -> pathlib.Path:
        # a single look, so that a mount that is lost stops the run and does not make every record bad
        require(self._folder.is_dir(), KEY, str(self._folder), "the folder that was there at first")
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
            require(folder.is_dir(), KEY, self._place, "the folder that was there at first")
            raise BadSample(f"no such picture: {folder / name}") from None


class TarPictures:
    """Members of a tar. The index of all members is made once, at opening, and goes with the object to other processes."""

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
        # tarfile takes a header that is cut or broken for the end
        require(
            self._file.read(end, len(TAR_END)) == TAR_END,
            KEY,
            str(path),
            f"a whole tar; it breaks off at byte {end}, after {len(self._members)} files",
        )

    def __getitem__(self, name: str) -> bytes:
        place = self._members.get(_inside(name))
        if place is None:
            raise BadSample(f"no such picture in {self._file.path}: {name}")
        return self._file.read(*place)


class ZipPictures:
    """Members of a zip. Each process reads the archive's directory once (about a second for 100,000 members)."""

    def __init__(self, path: pathlib.Path):
        self._file = LocalFile(path, KEY)
        try:
            require(
                len(self._archive.filelist) > 0,
                KEY,
                str(path),
                "an archive with pictures, it is empty",
            )
        except zipfile.BadZipFile as error:
            raise ConfigError(f"{KEY} = {str(path)!r}: expected a whole zip ({error}).") from None

    @functools.cached_property
    def _archive(self) -> zipfile.ZipFile:
        # given an open file, ZipFile never closes it: its count of readers, by which it closes its own, is not safe between threads
        return zipfile.ZipFile(self._file.opened)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_archive"}

    def __getitem__(self, name: str) -> bytes:
        try:
            member = self._archive.getinfo(_inside(name))
            if member.file_size > LARGEST:
                raise BadSample(f"picture of {member.file_size} bytes: {name}")
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


ARCHIVES = {".zip": ZipPictures, ".tar": TarPictures}
