"""A small source and how it is prepared without processes, for the tests of preparing."""

import io
import json
import pathlib

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from mod_jax.config import SourceConfig
from mod_jax.data.prepare.plan import Plan, begin, clear, finish
from mod_jax.data.prepare.shard import write_shard


def picture(number: int, form: str = "JPEG", side: int = 16) -> bytes:
    """Noise, so that no two are alike and a cut one is cut in its pixels."""
    file = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(number).integers(0, 256, (side, side + 3, 3), np.uint8)
    ).save(file, form)
    return file.getvalue()


def chat(number: int) -> dict:
    """A record of LLaVA's form: without a picture, with one, with two, or with one in its second turn, by turns."""
    question, images = [
        ("Why?", None),
        ("<image>\nWhat?", "{}.jpg"),
        ("Is <image> in <image>?", ["{}.jpg", "b/{}.png"]),
        ("Why?", ["{}.jpg"]),
    ][number % 4]
    name = lambda file: file.format(number)
    turns = [("human", question), ("gpt", f"Because of {number}.")]
    if number % 4 == 3:
        turns += [("human", "And <image>?"), ("gpt", "Also.")]
    record = {
        "id": f"r{number}",
        "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
    }
    return (
        record
        if images is None
        else {
            **record,
            "image": name(images) if isinstance(images, str) else list(map(name, images)),
        }
    )


def save_chats(folder: pathlib.Path, count: int = 23) -> SourceConfig:
    """Chats as a JSON list, their pictures in a folder."""
    images = folder / "images"
    (images / "b").mkdir(parents=True)
    for number in range(count):
        (images / f"{number}.jpg").write_bytes(picture(number))
        (images / f"b/{number}.png").write_bytes(picture(100 + number, "PNG"))
    (folder / "chat.json").write_text(json.dumps([chat(number) for number in range(count)]))
    return SourceConfig("chat", str(folder / "chat.json"), str(images))


def prepare_here(plan: Plan, source, max_bad_share: float = 1.0) -> dict:
    """What the command does, in this process."""
    index = begin(plan)
    if index is None:
        for shard in range(plan.shards):
            if not plan.report(shard).exists():
                write_shard(source, plan, shard)
        index = finish(plan, max_bad_share)
    clear(plan)
    return index


def stored(folder: pathlib.Path) -> list[dict]:
    """The records of a prepared folder in their order, read without our code."""
    shards = [
        ArrayRecordReader(str(folder / shard["file"]))
        for shard in json.loads((folder / "index.json").read_text())["shards"]
    ]
    return [msgpack.unpackb(data) for shard in shards for data in shard.read_all()]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Name -> bytes of each file."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}
