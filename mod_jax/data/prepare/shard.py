"""One shard of a prepared folder: its records read, checked, decoded once, and written."""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from mod_jax.config import ConfigError, require
from mod_jax.data.prepare.plan import (
    AGAIN,
    PARTIAL,
    Plan,
    describe,
    differences,
    is_remote,
    writing,
)
from mod_jax.data.samples.pixels import decode, picture_faults
from mod_jax.data.sources.kinds import Source
from mod_jax.data.sources.prepared import encode_record
from mod_jax.data.sources.record import BadSample
from mod_jax.storage.atomic import write_json

OPTIONS = "group_size:1,uncompressed"  # each record is a group of its own, for access by number; pictures are compressed already


def write_shard(
    source: Source, plan: Plan, shard: int, progress: Callable[[int], None] = lambda done: None
) -> dict:
    """Writes a shard, then its report. Nothing has its name before it is whole and on the disk.

    Records are read in the source's order, which its files are made for (a row group of parquet is decoded once), and wait in a file of their own until they
    are written in the shard's: memory holds one at a time.

    Args:
      source: the plan's, open.
      plan: what is prepared.
      shard: number.
      progress: is told how many of the shard's records were read.
    Returns:
      The report.
    Raises:
      ConfigError: if the source is gone or changed, or the disk is full; nothing is left of the shard then.
    """
    numbers, places, skipped = plan.numbers(shard), {}, []
    name = plan.file(shard)
    with (
        writing(plan.output),
        tempfile.TemporaryDirectory(
            PARTIAL, f"{name}-", None if is_remote(plan.output) else plan.output
        ) as folder,
        tempfile.TemporaryFile(dir=folder) as waiting,
    ):
        for done, number in enumerate(np.sort(numbers).tolist(), 1):
            try:
                data = read_record(source, number)
            except BadSample as error:
                skipped.append([number, source.name(number), str(error)])
            else:
                places[number] = waiting.tell(), len(data)
                waiting.write(data)
            progress(done)
        written = pathlib.Path(folder, name)
        _write(
            written, waiting, [places[number] for number in numbers.tolist() if number in places]
        )
        wrong = differences(describe(plan.source), plan.described)
        require(
            not wrong,
            "--source",
            plan.source.path,
            f"a source that stays as it is; it has {wrong}",
            "Begin again, in another folder.",
        )
        report = {"records": len(places), "bytes": written.stat().st_size, "skipped": skipped}
        _put(written, plan.folder / name)
        write_json(plan.report(shard), report)
    return report


def read_record(source: Source, number: int) -> bytes:
    """A record in the prepared form, with its pictures' own bytes; each was decoded once, to its end.

    Raises:
      BadSample: if it cannot be used.
      ConfigError: if the source is gone.
    """
    try:
        record = source[number]
    except OSError as error:
        raise ConfigError(
            f"--source: expected record {number} where it was when the source was opened ({error}). Bring it back. {AGAIN}"
        ) from None
    pictures = tuple(map(_contents, record.images))
    for picture in pictures:
        decode(picture)
    return encode_record(dataclasses.replace(record, images=pictures))


def _contents(picture: bytes | pathlib.Path) -> bytes:
    if isinstance(picture, bytes):
        return picture
    with picture_faults(picture):
        return picture.read_bytes()


def _write(path: pathlib.Path, waiting: BinaryIO, places: list[tuple[int, int]]) -> None:
    """Makes an array_record of stretches (start, length) of a file, on the disk when this returns."""
    writer = ArrayRecordWriter(str(path), OPTIONS)
    try:
        for start, length in places:
            waiting.seek(start)
            writer.write(waiting.read(length))
        writer.close()  # raises what went wrong in a write, too
    except RuntimeError as error:
        raise OSError(f"{error}") from None
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _put(path: pathlib.Path, target: epath.Path) -> None:
    if is_remote(str(target)):
        epath.Path(path).copy(target, overwrite=True)
    else:
        path.replace(target)
