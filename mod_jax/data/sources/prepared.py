"""The prepared form of a source, a folder: shards of array_record, and an index.json that names them and is written last.

A record is a msgpack map {id: str, turns: [[question, answer], ...], rejected: str, images: [encoded bytes, ...]}.
The index is {format, records, shards: [{file, records, bytes}, ...], skipped: {reason: [[id, detail], ...]}, source: what it was made from, and how}.
"""

import json
import pathlib

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader

from mod_jax.config import SourceConfig, require
from mod_jax.data.sources.array_record import read_stored
from mod_jax.data.sources.record import BadSample, Record

FORMAT = 1
INDEX = "index.json"
REMEDY = (
    "Make it with: python -m mod_jax.prepare (the same command continues one that was stopped)."
)


def encode_record(record: Record) -> bytes:
    """A record with its pictures' files, as msgpack.

    Raises:
      OSError: if a picture's file cannot be read.
    """
    images = [image if isinstance(image, bytes) else image.read_bytes() for image in record.images]
    return msgpack.packb(
        {"id": record.id, "turns": record.turns, "rejected": record.rejected, "images": images}
    )


def decode_record(data: bytes) -> Record:
    """What encode_record was given, pictures as bytes.

    Raises:
      BadSample: if it is no such map.
    """
    try:
        fields = msgpack.unpackb(data)
        turns = tuple((str(question), str(answer)) for question, answer in fields["turns"])
        return Record(fields["id"], tuple(fields["images"]), turns, fields["rejected"])
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise BadSample(f"not a prepared record: {error!r}") from None


def read_index(folder: pathlib.Path) -> dict:
    """The index of a prepared folder, every shard of it there and as long as it says.

    Raises:
      ConfigError: for a folder that is not whole, or of another format.
    """
    key, path = "data.sources.path", folder / INDEX
    require(
        folder.is_dir(),
        key,
        str(folder),
        "an existing local folder",
        "A bucket is read through a mount, or copied first.",
    )
    require(
        path.is_file(),
        key,
        str(folder),
        f"a prepared folder, whole: {INDEX} is written last, and is not there",
        REMEDY,
    )
    try:
        index = json.loads(path.read_text())
        shards = {folder / shard["file"]: int(shard["records"]) for shard in index["shards"]}
        known = index["format"] == FORMAT and index["records"] == sum(shards.values()) > 0
    except (ValueError, KeyError, TypeError):
        known = False
    require(known, key, str(path), f"an index of format {FORMAT} with at least one record", REMEDY)
    lengths = {shard: _length(shard) for shard in shards}
    wrong = [
        f"{shard.name} has {lengths[shard]} records, not {records}"
        for shard, records in shards.items()
        if lengths[shard] != records
    ]
    require(
        not wrong,
        key,
        str(folder),
        f"the shards its index names, whole; {'; '.join(wrong)}",
        "Copy it again, or delete it and prepare it again.",
    )
    return index


def _length(shard: pathlib.Path) -> int:
    """Records of a shard; 0 for one that is cut or missing."""
    reader = ArrayRecordReader(str(shard))
    try:
        records = reader.num_records()
        reader.close()
        return records
    except RuntimeError:
        return 0


class PreparedSource:
    """Random access to a prepared folder."""

    def __init__(self, config: SourceConfig):
        self._folder = pathlib.Path(config.path)
        shards = read_index(self._folder)["shards"]
        # "file[first:end]" spares the library opening every shard once more to count its records
        self._shards = ArrayRecordDataSource(
            [
                f"{self._folder / shard['file']}[0:{shard['records']}]"
                for shard in shards
                if shard["records"]
            ]
        )

    def __len__(self) -> int:
        return len(self._shards)

    def name(self, number: int) -> str:
        """The record's id; its number where it cannot be read."""
        try:
            return self[number].id
        except ValueError:  # BadSample, or ConfigError
            return str(number)

    def __getitem__(self, number: int) -> Record:
        return decode_record(read_stored(self._shards, number, self._folder))
