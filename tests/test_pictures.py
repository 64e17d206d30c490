"""Places of pictures (folder, bucket, zip, tar), against plain reads of the same files."""

import os
import pathlib
import pickle
import random
import shutil
import sys
import tarfile
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from etils import epath

from mod_jax.config import ConfigError
from mod_jax.data.sources.pictures import open_pictures
from mod_jax.data.sources.record import BadSample

NAMES = ["a.jpg", "coco/train2017/000.jpg", "coco/ü b.png", *(f"many/{n}.jpg" for n in range(40))]
PLACES = ("folder", "gs", "stored.zip", "deflated.zip", "plain.tar", "dotted.tar")


@pytest.fixture
def folder(tmp_path):
    """A folder `pictures` whose files hold random bytes and a compressible rest."""
    rng = random.Random(0)
    for name in NAMES:
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(1, 3000)) + b"x" * rng.randrange(2000))
    return tmp_path / "pictures"


@pytest.fixture
def bucket(folder):
    """Makes gs://bucket the folder's parent."""

    def mapped(function, path, *rest):
        return function(str(path).replace("gs://bucket", str(folder.parent)), *rest)

    with epath.testing.mock_epath(open=mapped, isdir=mapped, exists=mapped):
        yield


def place(folder: pathlib.Path, kind: str) -> str:
    """Puts the folder's files into another kind of place, and returns its name."""
    if kind == "folder":
        return str(folder)
    if kind == "gs":
        return "gs://bucket/pictures"
    path = folder.with_name(kind)
    if path.suffix == ".zip":
        compression = zipfile.ZIP_STORED if kind == "stored.zip" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name in NAMES:
                archive.write(folder / name, name)
    else:
        with tarfile.open(path, "w") as archive:
            archive.add(folder, "." if kind == "dotted.tar" else "")
    return str(path)


def contents(picture: bytes | pathlib.Path) -> bytes:
    return picture if isinstance(picture, bytes) else picture.read_bytes()


@pytest.mark.parametrize("kind", PLACES)
def test_every_place_gives_the_files_bytes(folder, bucket, kind):
    pictures = open_pictures(place(folder, kind))
    for name in (*NAMES, "./a.jpg", "coco/../a.jpg"):
        assert contents(pictures[name]) == (folder / name).read_bytes()
    assert isinstance(pictures["a.jpg"], pathlib.Path if kind == "folder" else bytes)


@pytest.mark.parametrize("kind", PLACES)
def test_names_that_leave_the_place_are_bad(folder, bucket, kind):
    (folder.parent / "secret").write_text("secret")
    pictures = open_pictures(place(folder, kind))
    for name in ("../secret", "coco/../../secret", str(folder.parent / "secret"), "..", "//secret"):
        with pytest.raises(BadSample, match=r"picture outside of data\.sources\.images: "):
            pictures[name]


@pytest.mark.parametrize("kind", PLACES[1:])
def test_missing_pictures_are_bad_by_name(folder, bucket, kind):
    pictures = open_pictures(place(folder, kind))
    with pytest.raises(BadSample, match=r"no such picture.*coco/none\.jpg"):
        pictures["coco/none.jpg"]


def test_a_missing_file_of_a_folder_is_found_when_it_is_decoded(folder):
    assert open_pictures(str(folder))["none.jpg"] == folder / "none.jpg"


@pytest.mark.parametrize("kind", PLACES)
def test_places_travel_to_another_process_small_and_unopened(folder, bucket, kind):
    pictures = open_pictures(place(folder, kind))
    contents(pictures[NAMES[0]])
    sent = pickle.dumps(pictures)
    assert len(sent) < 4000
    assert contents(pickle.loads(sent)[NAMES[2]]) == (folder / NAMES[2]).read_bytes()


@pytest.mark.parametrize("kind", PLACES)
def test_threads_read_at_once(folder, bucket, kind):
    pictures = pickle.loads(
        pickle.dumps(open_pictures(place(folder, kind)))
    )  # a copy that is not yet open
    names = random.Random(1).choices(NAMES, k=400)
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda name: contents(pictures[name]), names))
    assert read == [(folder / name).read_bytes() for name in names]


@pytest.mark.parametrize("kind", ["folder", "gs"])
def test_a_folder_that_vanishes_stops_the_run(folder, bucket, kind):
    pictures = open_pictures(place(folder, kind))
    shutil.rmtree(folder)
    with pytest.raises(
        ConfigError,
        match=r"data\.sources\.images = '.*pictures': expected the folder that existed when",
    ):
        pictures["a.jpg"]


@pytest.mark.parametrize("kind", ["stored.zip", "plain.tar"])
def test_an_archive_that_vanishes_or_changes_is_not_taken_for_the_first(folder, kind):
    path = pathlib.Path(place(folder, kind))
    sent = pickle.dumps(open_pictures(str(path)))
    os.utime(path, ns=(0, 0))
    for change in (lambda: None, path.unlink):
        change()
        with pytest.raises(
            ConfigError,
            match=rf"data\.sources\.images = '.*{kind}': expected the file that existed when",
        ):
            pickle.loads(sent)["a.jpg"]


def test_an_open_archive_is_read_on_when_its_name_is_gone(folder):
    path = pathlib.Path(place(folder, "stored.zip"))
    pictures = open_pictures(str(path))
    path.unlink()
    assert pictures["a.jpg"] == (folder / "a.jpg").read_bytes()


def test_a_tar_cut_anywhere_is_refused(folder):
    shutil.rmtree(folder / "many")
    path = pathlib.Path(place(folder, "plain.tar"))
    data = path.read_bytes()
    end = data.rstrip(b"\0")
    for cut in range(0, len(end) + 1, 256):
        path.write_bytes(data[:cut])
        with pytest.raises(
            ConfigError, match=r"data\.sources\.images = '.*plain\.tar': expected a whole tar"
        ):
            open_pictures(str(path))


def test_a_zip_that_is_cut_or_empty_is_refused(folder):
    path = pathlib.Path(place(folder, "stored.zip"))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ConfigError, match="expected a whole zip"):
        open_pictures(str(path))
    zipfile.ZipFile(path, "w").close()
    with pytest.raises(ConfigError, match="an archive with pictures; it is empty"):
        open_pictures(str(path))


def test_a_corrupt_member_of_a_zip_is_bad_and_the_others_are_read(folder):
    path = pathlib.Path(place(folder, "stored.zip"))
    data = path.read_bytes()
    first = (folder / NAMES[0]).read_bytes()
    at = data.index(first)
    path.write_bytes(data[:at] + bytes([first[0] ^ 1]) + data[at + 1 :])
    pictures = open_pictures(str(path))
    with pytest.raises(BadSample, match=r"unreadable in .*stored\.zip: 'a\.jpg' \(Bad CRC-32"):
        pictures["a.jpg"]
    assert pictures[NAMES[1]] == (folder / NAMES[1]).read_bytes()


def test_a_member_that_unpacks_to_too_much_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr("mod_jax.data.sources.pictures.LARGEST", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes((1 << 20) + 1))
        archive.writestr("b.jpg", bytes(1 << 20))
    pictures = open_pictures(str(tmp_path / "bomb.zip"))
    with pytest.raises(
        BadSample, match=r"picture of more than 1048576 bytes: 'a\.jpg' \(1048577\)"
    ):
        pictures["a.jpg"]
    assert len(pictures["b.jpg"]) == 1 << 20


def test_places_that_are_none_are_refused_when_opened(folder, bucket):
    (folder / "a.tar.gz").write_bytes(b"x")
    for name in (str(folder / "none"), "gs://bucket/none", str(folder / "none.zip")):
        with pytest.raises(
            ConfigError, match=rf"data\.sources\.images = '{name}': expected an existing folder"
        ):
            open_pictures(name)
    with pytest.raises(
        ConfigError,
        match=r"expected an archive of \.zip or \.tar\. "
        "A compressed tar does not allow random access: unpack it",
    ):
        open_pictures(str(folder / "a.tar.gz"))


def test_without_a_place_a_picture_is_bad():
    with pytest.raises(
        BadSample, match=r"picture 'a\.jpg', but no data\.sources\.images to find it in"
    ):
        open_pictures("")["a.jpg"]


# Names in one normal form

SPELT = {
    "dot": "./coco/train2017/000.jpg",
    "backslash": "coco\\train2017\\000.jpg",
    "dot and backslash": ".\\coco\\train2017\\000.jpg",
    "space": " coco/train2017/000.jpg\n",
    "slashes": "coco//train2017/./000.jpg",
    "detour": "coco/train2014/../train2017/000.jpg",
    "absolute": "{place}/coco/train2017/000.jpg",
    "absolute backslash": "{place}\\coco\\train2017\\000.jpg",
}


@pytest.mark.parametrize("kind", PLACES)
def test_one_picture_is_found_however_its_name_is_spelt(folder, bucket, kind):
    name = place(folder, kind)
    pictures = open_pictures(name)
    expected = (folder / "coco/train2017/000.jpg").read_bytes()
    for spelling in SPELT.values():
        assert contents(pictures[spelling.format(place=name)]) == expected, spelling
    if not kind.startswith("gs"):
        assert contents(pictures[f"file://{name}/coco/train2017/000.jpg"]) == expected
        assert contents(pictures[f"file://{name}/coco/%C3%BC%20b.png"])


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("named", ["NFC", "NFD"])
def test_unicode_forms_name_the_same_picture(folder, bucket, kind, stored, named, monkeypatch):
    """macOS writes decomposed names, most other systems composed ones."""
    file = unicodedata.normalize(stored, "tür/für.jpg")
    (folder / file).parent.mkdir()
    (folder / file).write_bytes(b"the picture")
    monkeypatch.setattr(sys.modules[__name__], "NAMES", [*NAMES, file])
    pictures = open_pictures(place(folder, kind))
    assert contents(pictures[unicodedata.normalize(named, "tür/für.jpg")]) == b"the picture"


@pytest.mark.parametrize("kind", PLACES)
def test_a_name_that_is_no_file_there_says_so_in_one_short_line(folder, bucket, kind):
    pictures = open_pictures(place(folder, kind))
    faults = {
        "https://example.org/a.jpg": "picture at a URL, which is not downloaded",
        "C:\\data\\a.jpg": "picture outside of data.sources.images",
        "/elsewhere/" + "x" * 3000 + "/a.jpg": "picture outside of data.sources.images",
    }
    for name, message in faults.items():
        with pytest.raises(BadSample, match=message) as raised:
            pictures[name]
        assert len(str(raised.value)) < 200 and "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".ZIP", ".Tar", ".TAR"])
def test_suffixes_of_archives_have_no_case(folder, suffix):
    path = pathlib.Path(place(folder, "stored.zip" if suffix == ".ZIP" else "plain.tar"))
    path = path.rename(path.with_suffix(suffix))
    assert open_pictures(str(path))["a.jpg"] == (folder / "a.jpg").read_bytes()


def test_links_in_a_tar_are_followed_within_it(folder):
    path = folder.with_name("links.tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder / "a.jpg", "./files/a.jpg")
        for name, kind, target in [
            ("hard.jpg", tarfile.LNKTYPE, "./files/a.jpg"),
            ("sub/soft.jpg", tarfile.SYMTYPE, "../files/a.jpg"),
            ("again.jpg", tarfile.SYMTYPE, "sub/soft.jpg"),
            ("folder", tarfile.SYMTYPE, "files"),
            ("loop.jpg", tarfile.SYMTYPE, "loop.jpg"),
            ("outside.jpg", tarfile.SYMTYPE, "../../a.jpg"),
            ("absolute.jpg", tarfile.SYMTYPE, "/etc/hostname"),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    pictures = open_pictures(str(path))
    for name in ("files/a.jpg", "hard.jpg", "sub/soft.jpg", "again.jpg", "folder/a.jpg"):
        assert pictures[name] == (folder / "a.jpg").read_bytes(), name
    for name in ("loop.jpg", "outside.jpg", "absolute.jpg", "folder"):
        with pytest.raises(BadSample, match=f"no such picture in .*links.tar: '{name}'"):
            pictures[name]


@pytest.mark.parametrize(
    "page, name",
    [
        ("utf-8", "fünf/照片.jpg"),
        ("cp850", "fünf/tür.jpg"),
        ("cp1252", "fünf/tür.jpg"),
        ("gb18030", "照片/一.jpg"),
        ("cp932", "写真/二.jpg"),
        ("cp1251", "фото.jpg"),
    ],
)
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_names_of_a_zip_may_be_in_the_code_page_of_a_system(tmp_path, page, name, separator):
    """Tools that do not mark names as UTF-8 write them so; zipfile takes all of these for cp437."""
    path = tmp_path / "old.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x" * len(name.encode(page)), b"the picture")
    written = name.replace("/", separator).encode(page)
    path.write_bytes(path.read_bytes().replace(b"x" * len(written), written))
    assert open_pictures(str(path))[name] == b"the picture"
