"""Writes one shard of a prepared folder, after checking its records and decoding their pictures."""

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
    writing,
)
from mod_jax.data.samples.pixels import decode, picture_faults
from mod_jax.data.sources.kinds import Source
from mod_jax.data.sources.prepared import encode_record
from mod_jax.data.sources.record import BadSample, Record
from mod_jax.data.sources.unused_keys import UnusedKeys
from mod_jax.storage.atomic import write_json
from mod_jax.storage.place import is_remote

# A group of its own for each record allows random access. Pictures are already compressed.
OPTIONS = "group_size:1,uncompressed"


def write_shard(
    source: Source, plan: Plan, shard: int, progress: Callable[[int], None] = lambda done: None
) -> dict:
    """Writes a shard, then its report. Neither gets its name before it is complete and on the disk.

    Records are read in the source's order, which suits its files (each row group of a parquet file
    is decoded once). They are kept in a temporary file until they are written in the order of the
    shard, so that memory holds one record at a time.

    Args:
      source: The open source of the plan.
      plan: What to prepare.
      shard: Number of the shard.
      progress: Called with the number of the shard's records read so far.
    Returns:
      The report.
    Raises:
      ConfigError: If the source was removed or changed, or the disk is full. Nothing is left of the
        shard then.
    """
    numbers = plan.numbers(shard)
    places: dict[int, tuple[int, int]] = {}  # record -> (start, length) in the temporary file
    skipped: list[list] = []
    unused = UnusedKeys()
    name = plan.file(shard)
    parent = None if is_remote(plan.output) else plan.output
    with (
        writing(plan.output),
        tempfile.TemporaryDirectory(suffix=PARTIAL, prefix=f"{name}-", dir=parent) as folder,
        tempfile.TemporaryFile(dir=folder) as waiting,
    ):
        for done, number in enumerate(np.sort(numbers).tolist(), 1):
            try:
                record = read_record(source, number)
            except BadSample as error:
                skipped.append([number, source.name(number), str(error)])
            else:
                data = encode_record(record)
                unused.add(record.unused)
                places[number] = (waiting.tell(), len(data))
                waiting.write(data)
            progress(done)
        written = pathlib.Path(folder, name)
        in_order = [places[number] for number in numbers.tolist() if number in places]
        _write(written, waiting, in_order)
        wrong = differences(describe(plan.source), plan.described)
        require(
            not wrong,
            "--source",
            plan.source.path,
            f"a source that does not change during the run; it has {wrong}",
            "Start again in another folder.",
        )
        report = {
            "records": len(places),
            "bytes": written.stat().st_size,
            "skipped": skipped,
            "unused": dataclasses.asdict(unused),
        }
        _put(written, plan.folder / name)
        write_json(plan.report(shard), report)
    return report


def read_record(source: Source, number: int) -> Record:
    """Reads a record with the contents of its pictures' files.

    Every picture is decoded once, to its end.

    Raises:
      BadSample: If the record cannot be used.
      ConfigError: If the source was removed.
    """
    try:
        record = source[number]
    except OSError as error:
        raise ConfigError(
            f"--source: expected record {number} where it was when the source was opened "
            f"({error}). Bring it back. {AGAIN}"
        ) from None
    pictures = tuple(map(_contents, record.images))
    for picture in pictures:
        decode(picture)
    return dataclasses.replace(record, images=pictures)


def _contents(picture: bytes | pathlib.Path) -> bytes:
    if isinstance(picture, bytes):
        return picture
    with picture_faults(picture):
        return picture.read_bytes()


def _write(path: pathlib.Path, waiting: BinaryIO, places: list[tuple[int, int]]) -> None:
    """Writes stretches (start, length) of a file as records of an array_record, and syncs it."""
    writer = ArrayRecordWriter(str(path), OPTIONS)
    try:
        for start, length in places:
            waiting.seek(start)
            writer.write(waiting.read(length))
        writer.close()  # also raises the errors of earlier writes
    except RuntimeError as error:
        raise OSError(f"{error}") from None
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _put(path: pathlib.Path, target: epath.Path) -> None:
    if is_remote(target):
        epath.Path(path).copy(target, overwrite=True)
    else:
        path.replace(target)
