"""Reads the values under which an entry names its pictures: names, bytes, data URLs, and base64."""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from mod_jax.data.sources import keys
from mod_jax.data.sources.pictures import Pictures
from mod_jax.data.sources.record import BadSample, Picture, quoted

LONGEST_NAME = 4096  # characters of the longest path that Linux accepts
_DATA_URL = re.compile(r"data:[^,]{0,100},")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
# First bytes of a JPEG, PNG, GIF, WEBP, BMP, and TIFF.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def values_of(entry: Mapping[str, Any]) -> list:
    """Returns the values of the pictures that an entry names, in their order.

    Raises:
      BadSample: If `image` and `images` name different pictures.
    """
    value = keys.first_of(entry, keys.PICTURES)
    if isinstance(value, (list, tuple)):
        return list(value)
    return [] if is_null(value) else [value]


def names_nothing(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has a key for a picture, but no picture there: null, or an empty text.

    An empty list says that there are no pictures.
    """
    there = [entry[key] for key in keys.PICTURES if key in entry]
    return any(map(is_null, there)) and all(is_null(value) or value == [] for value in there)


def is_null(value: Any) -> bool:
    """Whether a value stands for no picture: null, an empty text, or {bytes, path} of nulls."""
    if isinstance(value, Mapping):
        return all(part is None for part in value.values())
    return value is None or value == ""


def read_picture(value: Any, place: Pictures) -> Picture:
    """Reads the picture of a value.

    Args:
      value: The name of a picture, its bytes, a data URL or base64 of them, or {bytes, path} of
        which one is enough.
      place: Where pictures are found by name.
    Raises:
      BadSample: If the value is of another kind, is empty, or names no picture of the place.
    """
    if isinstance(value, Mapping):
        value = _content(value)
    if isinstance(value, bytes):
        if not value:
            raise BadSample("image is empty: 0 bytes")
        return value
    if not isinstance(value, str) or not value:
        raise BadSample("image is neither a file name nor a list of file names")
    encoded = _decoded(value)
    if encoded is not None:
        return encoded
    if len(value) > LONGEST_NAME:
        raise BadSample(
            f"image is a text of {len(value)} characters, neither a file name nor a picture in "
            f"base64: {quoted(value)}"
        )
    return place[value]


def _content(value: Mapping[str, Any]) -> Any:
    """Returns the bytes of {bytes, path}, which JSON holds as base64, or else the path."""
    content = value.get("bytes")
    if isinstance(content, str) and content:
        return _decoded(content)
    return content or value.get("path") or content


def _decoded(text: str) -> bytes | None:
    """Returns the bytes of a data URL, or of base64 that begins as a picture does."""
    url = _DATA_URL.match(text)
    if url is None and not _BASE64.fullmatch(text):
        return None
    try:
        encoded = "".join(text[url.end() if url else 0 :].split())
        decoded = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except binascii.Error:
        decoded = b""
    if url and (";base64" not in url[0] or not decoded):
        raise BadSample(f"image is a data URL without a picture in base64: {quoted(text)}")
    return decoded if url or decoded.startswith(_SIGNATURES) else None
