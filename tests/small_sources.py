"""A small source, and preparing it in this process, for the tests of `mod_jax.prepare`."""

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
    """Encodes noise: no two pictures are alike, and truncation always loses pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def chat(number: int) -> dict:
    """A record in LLaVA's form.

    In turn it has no picture, one, two, or one in its second turn.
    """
    question, images = [
        ("Why?", None),
        ("<image>\nWhat?", f"{number}.jpg"),
        ("Is <image> in <image>?", [f"{number}.jpg", f"b/{number}.png"]),
        ("Why?", [f"{number}.jpg"]),
    ][number % 4]
    turns = [("human", question), ("gpt", f"Because of {number}.")]
    if number % 4 == 3:
        turns += [("human", "And <image>?"), ("gpt", "Also.")]
    messages = [{"from": speaker, "value": text} for speaker, text in turns]
    record = {"id": f"r{number}", "conversations": messages}
    return record if images is None else {**record, "image": images}


def save_chats(folder: pathlib.Path, count: int = 23) -> SourceConfig:
    """Writes chats as a JSON list, and their pictures into a folder."""
    images = folder / "images"
    (images / "b").mkdir(parents=True)
    for number in range(count):
        (images / f"{number}.jpg").write_bytes(picture(number))
        (images / f"b/{number}.png").write_bytes(picture(100 + number, "PNG"))
    (folder / "chat.json").write_text(json.dumps([chat(number) for number in range(count)]))
    return SourceConfig("chat", str(folder / "chat.json"), str(images))


def prepare_here(plan: Plan, source, max_bad_share: float = 1.0) -> dict:
    """Does in this process what the command does with workers."""
    index = begin(plan)
    if index is None:
        for shard in range(plan.shards):
            if not plan.report(shard).exists():
                write_shard(source, plan, shard)
        index = finish(plan, max_bad_share)
    clear(plan)
    return index


def stored(folder: pathlib.Path) -> list[dict]:
    """Reads the records of a prepared folder in order, without our code."""
    index = json.loads((folder / "index.json").read_text())
    shards = [ArrayRecordReader(str(folder / shard["file"])) for shard in index["shards"]]
    return [msgpack.unpackb(data) for shard in shards for data in shard.read_all()]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Reads every file: name -> bytes."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}
