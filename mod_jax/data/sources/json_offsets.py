"""Finds where the records of a JSON list or of JSON Lines begin, in one pass over the file.

The pass holds one window of the file in memory. It decodes the text as Latin-1, so that a character
is a byte. As JSON's own characters are ASCII, the ranges of the records are right whatever their
strings contain, even bytes that are not UTF-8. The text between two offsets is a record followed by
white space or a comma (`SEPARATORS`).
"""

import array
import functools
import json
import os
import pathlib
import re
from typing import BinaryIO, NoReturn

import numpy as np

from mod_jax.config import ConfigError

KEY = "data.sources.path"
LIST = ".json"  # suffix of a list, which any other suffix may replace
LINES = (".jsonl", ".ndjson")  # suffixes of JSON Lines
SEPARATORS = b" \t\r\n,"
AFTER_VALUE = (" ", "\t", "\r", "\n", ",", "]")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8; it may stand before the text
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
WINDOW = 1 << 23  # bytes read at a time
LONGEST = 1 << 28  # bytes of the longest record; one that does not end within them is invalid
NOT_SPACE = re.compile("[^ \t\r\n]")
DECODER = json.JSONDecoder(parse_int=str, parse_float=str)  # finds ends of values, not numbers


def index_records(path: pathlib.Path, window: int = WINDOW, longest: int = LONGEST) -> np.ndarray:
    """Finds the byte offsets of all records.

    Args:
      path: A file of JSON Lines if its suffix is one of `LINES`, otherwise of a JSON list.
      window: Bytes read at a time.
      longest: Bytes of the longest record.
    Returns:
      i64[records + 1]: where each record begins, and where the last one ends.
    Raises:
      ConfigError: If the file is empty, truncated, of another form, or goes on after its list. The
        message names the byte and the number of complete records before it.
    """
    with open(path, "rb") as file:
        begin = _beginning(file)
        if path.suffix.lower() in LINES:
            offsets = _lines(file, begin, longest)
        else:
            offsets = _elements(_Window(file, window, longest), begin)
    return np.frombuffer(offsets, np.int64)


def _beginning(file: BinaryIO) -> int:
    """Returns the byte at which the text begins, after a byte order mark."""
    mark = file.read(len(BYTE_ORDER_MARK))
    if mark.startswith(UTF_16):
        _refuse(file, 0, 0, 0, "the text is UTF-16, expected UTF-8")
    return len(mark) if mark == BYTE_ORDER_MARK else 0


def _refuse(file: BinaryIO, records: int, start: int, byte: int, why: str) -> NoReturn:
    """Raises the ConfigError for text that begins at byte `start` and is invalid at `byte`."""
    size = os.fstat(file.fileno()).st_size
    raise ConfigError(
        f"{KEY} = {file.name!r}: expected a JSON list with at least one record, or JSON Lines in a "
        f"file named {' or '.join(LINES)}. {records} records are complete; the text from byte "
        f"{start} on is invalid at byte {byte} of {size}: {why}."
    )


def _skip_space(text: str, start: int) -> int:
    """Returns the position of the first character from `start` on that is not white space."""
    found = NOT_SPACE.search(text, start)
    return found.start() if found else len(text)


def _value_end(text: str, start: int) -> int:
    try:
        _, end = DECODER.raw_decode(text, start)
    except RecursionError:
        raise json.JSONDecodeError("values are nested too deeply", text, start) from None
    return end


class _Window:
    """A stretch of the file that moves forward as reading proceeds."""

    def __init__(self, file: BinaryIO, size: int, longest: int):
        self.file = file
        self.size = size
        self.longest = longest
        self.start = 0  # byte of the file at which the window begins
        self.end = 0  # and ends
        self.text = ""
        self.file_size = os.fstat(file.fileno()).st_size

    def move(self, start: int, size: int) -> None:
        """Reads so many bytes of the file from `start`; fewer at its end."""
        self.file.seek(start)
        self.text = self.file.read(size).decode("latin-1")
        self.start = start
        self.end = start + len(self.text)

    def after_space(self, at: int) -> tuple[int, str]:
        """Finds the first byte from `at` on that is not white space.

        Returns:
          Its offset and its character; "" at the end of the file.
        """
        while True:
            at = self.start + _skip_space(self.text, at - self.start)
            if at < self.end:
                return at, self.text[at - self.start]
            if at >= self.file_size:
                return at, ""
            self.move(at, self.size)

    def after_value(self, at: int) -> int:
        """Returns the offset at which the JSON value that begins at byte `at` ends.

        Raises:
          JSONDecodeError: If it is invalid, or does not end within `longest` bytes.
        """
        size = self.size
        while True:
            last = self.end >= self.file_size or size > self.longest
            try:
                end = _value_end(self.text, at - self.start)
                # A number at the end of the window may continue after it.
                if last or self.text[end : end + 1] in AFTER_VALUE:
                    return self.start + end
            except json.JSONDecodeError:
                if last:
                    raise
            self.move(at, size)
            size *= 2


def _elements(window: _Window, begin: int) -> array.array:
    """Returns the offsets of the elements of a list after `begin`, and where the last one ends."""
    offsets = array.array("q")

    def refuse(byte: int, why: str) -> NoReturn:
        _refuse(window.file, len(offsets), start, byte, why)

    window.move(begin, window.size)
    start, found = window.after_space(begin)
    if not found:
        refuse(start, "the file is empty")
    if found != "[":
        refuse(start, f"a list begins with '[', found {found!r}")
    start, found = window.after_space(start + 1)
    if found == "]":
        refuse(start, "the list is empty")
    while found != "]":
        try:
            end = window.after_value(start)
        except json.JSONDecodeError as error:
            refuse(window.start + error.pos, error.msg)
        offsets.append(start)
        start, found = window.after_space(end)
        if found == ",":
            start, _ = window.after_space(start + 1)
        elif not found:
            refuse(start, "the file ends before its list")
        elif found != "]":
            refuse(start, f"expected ',' or ']', found {found!r}")
    end, found = window.after_space(start + 1)
    if found:
        refuse(end, f"found {found!r} after the list")
    offsets.append(start)
    return offsets


def _lines(file: BinaryIO, begin: int, longest: int) -> array.array:
    """Returns the offsets of all lines after `begin` that are not blank, and the size of the file.

    Only the first and the last line are parsed. Any other may be a bad record, which is found when
    it is read, but a file that was truncated shows in its last line.
    """
    offsets = array.array("q")
    at = begin
    file.seek(begin)
    first = b""
    last = b""
    for line in iter(functools.partial(file.readline, longest), b""):
        if not line.isspace():
            offsets.append(at)
            first = first or line
            last = line
        at += len(line)
    if not offsets:
        _refuse(file, 0, 0, 0, "the file is empty")
    if first.lstrip().startswith(b"["):
        why = f"a list, where each line has to hold one record; name a list {LIST}"
        _refuse(file, 0, offsets[0], offsets[0], why)
    for number, line in ((0, first), (len(offsets) - 1, last)):
        start = offsets[number]
        text = line.decode("latin-1")
        try:
            end = _value_end(text, _skip_space(text, 0))
        except json.JSONDecodeError as error:
            _refuse(file, number, start, start + error.pos, error.msg)
        if _skip_space(text, end) < len(text):
            _refuse(file, number, start, start + end, "a line holds more than its record")
    offsets.append(at)
    return offsets
