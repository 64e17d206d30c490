"""The prepared form of a source: a folder of array_record shards, and an index that names them.

A record is a msgpack map {id: str, turns: [[question, answer], ...], rejected: str,
images: [encoded bytes, ...]}. It may also have system: str, and unlearnt: [number of a turn, ...].
The index, index.json, is written last. It is
{format, records, shards: [{file, records, bytes}, ...], skipped: {reason: [[id, detail], ...]},
source: the settings that the folder was made with}. If records had keys that training does not use,
it also has unused: {records: how many had such keys, keys: [key, ...]}.
"""

import hashlib
import json
import pathlib

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader

from mod_jax.config import require
from mod_jax.data.sources.array_record import read_stored
from mod_jax.data.sources.record import BadSample, Record

FORMAT = 1
INDEX = "index.json"
KEY = "data.sources.path"
REMEDY = (
    "Make it with: python -m mod_jax.prepare (the same command continues one that was stopped)."
)


def encode_record(record: Record) -> bytes:
    """Encodes a record, with the contents of its pictures' files, as msgpack.

    Raises:
      OSError: If a picture's file cannot be read.
    """
    images = [image if isinstance(image, bytes) else image.read_bytes() for image in record.images]
    fields = {
        "id": record.id,
        "turns": record.turns,
        "rejected": record.rejected,
        "images": images,
    }
    optional = {"system": record.system, "unlearnt": record.unlearnt}
    return msgpack.packb(fields | {key: value for key, value in optional.items() if value})


def decode_record(data: bytes) -> Record:
    """Decodes what `encode_record` returned; the pictures are bytes.

    Raises:
      BadSample: If `data` is not an encoded record.
    """
    try:
        fields = msgpack.unpackb(data)
        turns = tuple((str(question), str(answer)) for question, answer in fields["turns"])
        return Record(
            fields["id"],
            tuple(fields["images"]),
            turns,
            fields["rejected"],
            fields.get("system", ""),
            tuple(fields.get("unlearnt", ())),
        )
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise BadSample(f"not a prepared record: {error!r}") from None


def read_index(folder: pathlib.Path) -> dict:
    """Reads the index of a prepared folder and verifies the length of every shard.

    Raises:
      ConfigError: If the folder is incomplete or of another format.
    """
    path = folder / INDEX
    require(
        folder.is_dir(),
        KEY,
        str(folder),
        "an existing local folder",
        "Mount a bucket, or copy it to a local disk first.",
    )
    require(
        path.is_file(),
        KEY,
        str(folder),
        f"a complete prepared folder; {INDEX}, which is written last, is missing",
        REMEDY,
    )
    try:
        index = json.loads(path.read_text())
        shards = {folder / shard["file"]: int(shard["records"]) for shard in index["shards"]}
        known = index["format"] == FORMAT and index["records"] == sum(shards.values()) > 0
    except (ValueError, KeyError, TypeError):
        known = False
    require(known, KEY, str(path), f"an index of format {FORMAT} with at least one record", REMEDY)
    lengths = {shard: _length(shard) for shard in shards}
    wrong = [
        f"{shard.name} has {lengths[shard]} records, not {records}"
        for shard, records in shards.items()
        if lengths[shard] != records
    ]
    require(
        not wrong,
        KEY,
        str(folder),
        f"complete shards, as its index lists them; {'; '.join(wrong)}",
        "Copy it again, or delete it and prepare it again.",
    )
    return index


def _length(shard: pathlib.Path) -> int:
    """Returns the number of records of a shard; 0 if it is truncated or missing."""
    reader = ArrayRecordReader(str(shard))
    try:
        records = reader.num_records()
        reader.close()
        return records
    except RuntimeError:
        return 0


class PreparedSource:
    """Random access to the records of a prepared folder."""

    def __init__(self, path: str):
        """Opens the folder and verifies it.

        Raises:
          ConfigError: If the folder is incomplete or of another format.
        """
        self._folder = pathlib.Path(path)
        shards = read_index(self._folder)["shards"]
        listed = [(shard["file"], shard["records"]) for shard in shards]
        self._index = hashlib.sha256(repr(listed).encode()).digest()
        # Naming the range of records, "file[first:end]", spares the library opening every shard
        # again to count them.
        self._shards = ArrayRecordDataSource(
            [
                f"{self._folder / shard['file']}[0:{shard['records']}]"
                for shard in shards
                if shard["records"]
            ]
        )

    def __len__(self) -> int:
        return len(self._shards)

    def index(self) -> bytes:
        """Returns a checksum of the shards' names and lengths."""
        return self._index

    def name(self, number: int) -> str:
        """Returns the record's id, or its number if it cannot be read."""
        try:
            return self[number].id
        except ValueError:  # BadSample or ConfigError
            return str(number)

    def __getitem__(self, number: int) -> Record:
        return decode_record(read_stored(self._shards, number, self._folder))
