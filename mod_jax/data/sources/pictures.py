"""The places where sources find the pictures that their records name: folders, buckets, archives.

Every place can be read by name, from any thread and process.
"""

import contextlib
import functools
import os
import pathlib
import posixpath
import re
import tarfile
import unicodedata
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable
from typing import Protocol

from etils import epath

from mod_jax.config import ConfigError, require
from mod_jax.data.sources.local_file import LocalFile
from mod_jax.data.sources.record import BadSample, quoted, shortened

KEY = "data.sources.images"
BUCKET = "gs://"
FILE = "file://"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
DRIVE = re.compile(r"[A-Za-z]:/")  # with which a path of Windows begins
TAR_END = bytes(1024)  # a tar ends with two blocks of zeros
LARGEST = 1 << 28  # bytes; a member of a zip that claims to be larger is not unpacked
MOST_LINKS = 40  # links that are followed one after the other
IS_UTF8 = 0x800  # the flag of a zip's member whose name is UTF-8
CODE_PAGES = ("utf-8", "cp1252", "cp850", "gb18030", "cp932", "cp949", "cp950", "cp1251", "cp866")
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
        path.suffix.lower() in ARCHIVES,
        KEY,
        place,
        f"an archive of {' or '.join(ARCHIVES)}",
        "A compressed tar does not allow random access: unpack it.",
    )
    return ARCHIVES[path.suffix.lower()](path)


def spellings(name: str, *places: str) -> list[str]:
    """Returns the names under which a place may hold a picture, relative to the place.

    The name as it is written comes first, since a file may be called exactly so. Then comes the
    normal form (`normal`), and then its other Unicode form, as macOS writes it.

    Args:
      name: As a record names it. It may also be a path, or a file:// URL, that leads into a place.
      *places: Absolute paths of the place.
    Raises:
      BadSample: If the name leads out of the place, or is another URL.
    """
    text = urllib.parse.unquote(name.removeprefix(FILE)) if name.startswith(FILE) else name
    for place in places:
        for path in (text, text.strip().replace("\\", "/")):
            if path.startswith(place.rstrip("/") + "/"):
                text = path[len(place.rstrip("/")) + 1 :]
    plain = normal(text)
    if URL.match(text):
        raise BadSample(f"picture at a URL, which is not downloaded: {quoted(name)}")
    if plain.startswith(("/", "../")) or plain == ".." or DRIVE.match(plain):
        raise BadSample(f"picture outside of {KEY}: {quoted(name)}")
    found = [posixpath.normpath(text), plain, unicodedata.normalize("NFD", plain)]
    return list(dict.fromkeys(found))


def normal(name: str) -> str:
    """Returns the one form in which names are compared.

    Without space around it, with slashes instead of backslashes, without "." and "..", and with
    composed characters (Unicode's form NFC).
    """
    plain = posixpath.normpath(name.strip().replace("\\", "/"))
    return unicodedata.normalize("NFC", plain)


class NoPictures:
    """The place of a source without pictures. A record that names a picture is bad."""

    def __getitem__(self, name: str) -> bytes:
        raise BadSample(f"picture {quoted(name)}, but no {KEY} to find it in")


class FolderPictures:
    """Files of a local folder, as paths."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._paths = (str(folder.absolute()), str(folder.resolve()))

    def __getitem__(self, name: str) -> pathlib.Path:
        paths = [self._folder / spelling for spelling in spellings(name, *self._paths)]
        path = next(filter(os.path.isfile, paths), None)
        if path is None:
            # A lost mount must stop the run. Without this check every record would be bad instead.
            # It comes after the search: the folder may be lost meanwhile.
            require(self._folder.is_dir(), KEY, str(self._folder), FOLDER_AT_OPENING, BRING_BACK)
            path = paths[0]
        if os.path.isdir(path):
            raise BadSample(f"no such picture file: {quoted(str(path))} is a folder")
        return path


class BucketPictures:
    """Objects of a bucket under a prefix."""

    def __init__(self, place: str):
        self._place = place
        require(epath.Path(place).is_dir(), KEY, place, "an existing folder of a bucket")

    def __getitem__(self, name: str) -> bytes:
        folder = epath.Path(self._place)
        for spelling in spellings(name, self._place):
            with contextlib.suppress(FileNotFoundError):
                return (folder / spelling).read_bytes()
        require(folder.is_dir(), KEY, self._place, FOLDER_AT_OPENING, BRING_BACK)
        raise _missing(name, self._place)


def _missing(name: str, place: object) -> BadSample:
    return BadSample(f"no such picture in {shortened(str(place))}: {quoted(name)}")


class TarPictures:
    """Members of a tar, also by the names of its hard and symbolic links.

    The offsets of all members are indexed once, at opening, and pickled with the object.
    """

    def __init__(self, path: pathlib.Path):
        self._file = LocalFile(path, KEY)
        self._members: dict[str, tuple[int, int]] = {}  # name -> (start, size)
        self._links: dict[str, str] = {}  # name -> the name that it stands for
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    self._add(member)
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

    def _add(self, member: tarfile.TarInfo) -> None:
        name = normal(member.name.lstrip("/"))
        if member.isreg():
            self._members[name] = (member.offset_data, member.size)
        elif member.islnk():
            self._links[name] = normal(member.linkname.lstrip("/"))
        elif member.issym():
            self._links[name] = normal(posixpath.join(posixpath.dirname(name), member.linkname))

    def __getitem__(self, name: str) -> bytes:
        plain = normal(spellings(name, str(self._file.path.absolute()))[0])
        for _ in range(MOST_LINKS):
            if plain in self._members:
                start, size = self._members[plain]
                return self._file.read(start, size)
            plain = self._followed(plain)
        raise _missing(name, self._file.path)

    def _followed(self, name: str) -> str:
        """Replaces the first part of a path that is a link, be it to a file or to a folder."""
        parts = name.split("/")
        for count in range(1, len(parts) + 1):
            link = self._links.get("/".join(parts[:count]))
            if link is not None:
                return normal("/".join([link, *parts[count:]]))
        return name


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

    @functools.cached_property
    def _members(self) -> dict[str, zipfile.ZipInfo]:
        """Name in the normal form -> member."""
        files = [member for member in self._archive.filelist if not member.is_dir()]
        return {normal(member.filename.lstrip("/")): member for member in files}

    def __getstate__(self) -> dict:
        own = ("_archive", "_members")  # of this process
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def _member(self, name: str) -> zipfile.ZipInfo:
        written, *others = spellings(name, str(self._file.path.absolute()))
        exact = self._archive.NameToInfo.get(written) or self._members.get(normal(written))
        if exact:
            return exact
        # Tools that do not mark a name as UTF-8 write it in the code page of their system, and
        # zipfile decodes all of these as cp437.
        for page in CODE_PAGES:
            for spelling in (written, *others):
                with contextlib.suppress(UnicodeError):
                    decoded = normal(spelling.encode(page).decode("cp437"))
                    member = self._members.get(decoded)
                    if member and not member.flag_bits & IS_UTF8:
                        return member
        raise _missing(name, self._file.path)

    def __getitem__(self, name: str) -> bytes:
        member = self._member(name)
        if member.file_size > LARGEST:
            size = member.file_size
            raise BadSample(f"picture of more than {LARGEST} bytes: {quoted(name)} ({size})")
        try:
            return self._archive.read(member)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise BadSample(
                f"unreadable in {shortened(str(self._file.path))}: {quoted(name)} "
                f"({shortened(str(error))})"
            ) from None


ARCHIVES: dict[str, Callable[[pathlib.Path], Pictures]] = {".zip": ZipPictures, ".tar": TarPictures}
