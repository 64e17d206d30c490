"""Where the records of a JSON list or of JSON Lines begin, found in one pass that holds a window of the file.

Text is taken as Latin-1 here: then a character is a byte, and since JSON's own characters are ASCII, ranges of records come out right whatever is
in their strings, be it no UTF-8 at all. What is between two starts is a record with white space or a comma after it: see `SEPARATORS`.
"""

import array
import functools
import json
import os
import pathlib
import re
from typing import BinaryIO

import numpy as np

from mod_jax.config import ConfigError

KEY = "data.sources.path"
LINES = (".jsonl", ".ndjson")
SEPARATORS = b" \t\r\n,"
AFTER_VALUE = (" ", "\t", "\r", "\n", ",", "]")
WINDOW = 1 << 23  # bytes read at a time
LONGEST = 1 << 28  # bytes of the longest record; what has no end within them is no record
SPACE = re.compile("[ \t\r\n]*")
DECODER = json.JSONDecoder(parse_int=str, parse_float=str)  # only where a value ends is asked


def index_records(path: pathlib.Path, window: int = WINDOW, longest: int = LONGEST) -> np.ndarray:
    """Byte offsets of all records.

    Args:
      path: JSON Lines by its suffix (LINES), else a JSON list.
      window: bytes read at a time.
      longest: bytes a record may have.
    Returns:
      i64[records + 1]: where each record begins, and where the last one ends.
    Raises:
      ConfigError: for a file that is empty, cut, followed by something else, or of another form; it names the byte and the whole records before it.
    """
    with open(path, "rb") as file:
        offsets = (
            _lines(file, longest)
            if path.suffix in LINES
            else _elements(_Window(file, window, longest))
        )
    return np.frombuffer(offsets, np.int64)


def _refuse(file: BinaryIO, records: int, start: int, byte: int, why: str):
    raise ConfigError(
        f"{KEY} = {file.name!r}: expected a JSON list with at least one record, or JSON Lines in a file named {' or '.join(LINES)}. "
        f"{records} records are whole; what begins at byte {start} breaks at byte {byte} of {os.fstat(file.fileno()).st_size}: {why}."
    )


def _value_end(text: str, start: int) -> int:
    try:
        return DECODER.raw_decode(text, start)[1]
    except RecursionError:
        raise json.JSONDecodeError("values are nested too deeply", text, start) from None


class _Window:
    """A stretch of the file, moved forward as reading goes on."""

    def __init__(self, file: BinaryIO, size: int, longest: int):
        self.file, self.size, self.longest = file, size, longest
        self.start, self.text, self.end = 0, "", 0
        self.file_size = os.fstat(file.fileno()).st_size

    def move(self, start: int, size: int) -> None:
        self.file.seek(start)
        self.text = self.file.read(size).decode("latin-1")
        self.start, self.end = start, start + len(self.text)

    def after_space(self, at: int) -> tuple[int, str]:
        """The first byte from `at` on that is not white space: where, and what; nothing at the end of the file."""
        while True:
            at = self.start + SPACE.match(self.text, at - self.start).end()
            if at < self.end:
                return at, self.text[at - self.start]
            if at >= self.file_size:
                return at, ""
            self.move(at, self.size)

    def after_value(self, at: int) -> int:
        """Where the JSON value that begins at byte `at` ends.

        Raises:
          JSONDecodeError: if it does not, or not within `longest` bytes.
        """
        size = self.size
        while True:
            last = self.end >= self.file_size or size > self.longest
            try:
                end = _value_end(self.text, at - self.start)
                if (
                    last or self.text[end : end + 1] in AFTER_VALUE
                ):  # else a number may go on after the window
                    return self.start + end
            except json.JSONDecodeError:
                if last:
                    raise
            self.move(at, size)
            size *= 2


def _elements(window: _Window) -> array.array:
    """Offsets of the elements of a list."""
    offsets = array.array("q")

    def refuse(byte: int, why: str):
        _refuse(window.file, len(offsets), start, byte, why)

    start, found = window.after_space(0)
    if found != "[":
        refuse(start, f"it is no list, {found!r} stands here" if found else "the file is empty")
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
        elif found != "]":
            refuse(
                start,
                f"expected a comma or ], {found!r} stands here"
                if found
                else "the file ends before its list",
            )
    end, found = window.after_space(start + 1)
    if found:
        refuse(end, f"{found!r} follows the list")
    offsets.append(start)
    return offsets


def _lines(file: BinaryIO, longest: int) -> array.array:
    """Offsets of the lines that are not blank. Only the first and the last are parsed here: any other may be a bad record, but a cut shows at the end."""
    offsets, at, first, last = array.array("q"), 0, b"", b""
    for line in iter(functools.partial(file.readline, longest), b""):
        if not line.isspace():
            offsets.append(at)
            first, last = first or line, line
        at += len(line)
    if not offsets:
        _refuse(file, 0, 0, 0, "the file is empty")
    for number, line in ((0, first), (len(offsets) - 1, last)):
        text = line.decode("latin-1")
        try:
            end = _value_end(text, SPACE.match(text).end())
        except json.JSONDecodeError as error:
            _refuse(file, number, offsets[number], offsets[number] + error.pos, error.msg)
        if SPACE.fullmatch(text, end) is None:
            _refuse(
                file,
                number,
                offsets[number],
                offsets[number] + end,
                "a line holds more than its record",
            )
    offsets.append(at)
    return offsets
