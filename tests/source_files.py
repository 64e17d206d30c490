"""Writes small sources of every kind, and says which records they hold."""

import io
import itertools
import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image

from mod_jax.config import SourceConfig
from mod_jax.data.scenes.builder import SceneDifficulty, prepare
from mod_jax.data.sources.prepared import encode_record
from mod_jax.data.sources.record import Record

COUNTER = itertools.count()  # TFDS builders need distinct names
SCHEMA = pa.schema(
    [
        ("ds_name", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("question", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("idx", pa.int64()),
    ]
)
MESSAGES = tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()})


def human(text: str) -> dict:
    """A message of the human."""
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    """A message of the model."""
    return {"from": "gpt", "value": text}


def png(colour) -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(file, "PNG")
    return file.getvalue()


CHATS = [
    {
        "id": "one",
        "image": "a.png",
        "conversations": [human("Q\n<image>"), gpt("A"), human("R [1, {2}]"), gpt('B "quoted"')],
    },
    {
        "id": "two",
        "image": ["a.png", "b.png"],
        "conversations": [human("<image> or\n<image>?"), gpt("ü 💡\n")],
    },
    {"id": 3, "conversations": [human(" Q"), gpt("A ")]},
    {
        "id": "four",
        "image": ["b.png", "a.png", "b.png"],
        "conversations": [human("<image>"), gpt("A"), human("x<image>y<image>"), gpt("B")],
    },
    {"image": [], "conversations": [human("Q"), gpt("A")]},
]
PAIRS = [
    {
        "id": "p",
        "image": "a.png",
        "chosen": [human("<image>\nQ"), gpt("good")],
        "rejected": [human("<image>\nQ"), gpt("bad")],
    },
    {"id": "q", "image": "b.png", "question": "Q", "chosen": "good", "rejected": "bad"},
    {"id": "r", "image": ["a.png", "b.png"], "question": "Q", "chosen": "good", "rejected": "bad"},
    {"id": "s", "image": "b.png", "question": "Q <image>", "chosen": "good", "rejected": "bad"},
    {"id": "t", "question": "Q", "chosen": " good", "rejected": "bad\n"},
]
PAIR_QUESTIONS = ["<image>\nQ", "<image>\nQ", "<image>\n<image>\nQ", "Q <image>", "Q"]


def files_of(entry: dict) -> list[str]:
    """The names of an entry's pictures."""
    files = entry.get("image", [])
    return [files] if isinstance(files, str) else files


def chat_records(images: dict) -> list[Record]:
    """The records of CHATS, with the pictures `images[name]`."""
    records = []
    for number, entry in enumerate(CHATS):
        texts = [message["value"].strip() for message in entry["conversations"]]
        pictures = tuple(images[file] for file in files_of(entry))
        turns = tuple(zip(texts[::2], texts[1::2]))
        records.append(Record(str(entry.get("id", number)), pictures, turns))
    return records


def pair_records(images: dict) -> list[Record]:
    """The records of PAIRS, with the pictures `images[name]`."""
    records = []
    for entry, question in zip(PAIRS, PAIR_QUESTIONS):
        pictures = tuple(images[file] for file in files_of(entry))
        records.append(Record(entry["id"], pictures, ((question, "good"),), "bad"))
    return records


def write_pictures(folder: pathlib.Path) -> dict[str, bytes]:
    """Writes the pictures of CHATS and PAIRS, and returns them: name -> bytes."""
    pictures = {"a.png": png("red"), "b.png": png("blue")}
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    return pictures


def write_json(path: pathlib.Path, entries: list) -> None:
    """Writes JSON Lines if the suffix is .jsonl, otherwise a JSON list."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    text = "\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]"
    path.write_text(text, encoding="utf-8")


def rlaif_row(number: int, **fields) -> dict:
    """A row in RLAIF-V's form; `fields` replace its values."""
    row = {
        "ds_name": "set",
        "image": {"bytes": png((number % 256, 0, 0)), "path": f"{number}.jpg"},
        "question": f"What is {number}?",
        "chosen": f"good {number}",
        "rejected": f"bad {number}",
        "idx": number,
    }
    return row | fields


def write_rlaif(path: pathlib.Path, rows: list[dict], group: int, **options) -> None:
    """Writes a parquet file with `group` rows per row group."""
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=group, **options)


def write_tfds(folder: pathlib.Path, features: dict, examples: list[dict]) -> str:
    """Prepares a data set with the split `train`, and returns its folder."""
    methods = {
        "VERSION": tfds.core.Version("1.0.0"),
        "pkg_dir_path": epath.Path(__file__).parent,
        "__module__": __name__,
        "_info": lambda self: self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), disable_shuffling=True
        ),
        "_split_generators": lambda self, manager: {"train": enumerate(examples)},
        "_generate_examples": None,
    }
    made = type(f"Made{next(COUNTER)}", (tfds.core.GeneratorBasedBuilder,), methods)
    builder = made(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(register_checksums=False, compute_stats="skip")
    )
    return str(builder.data_path)


def write_prepared(folder: pathlib.Path, shards: list[list[Record]]) -> None:
    """Writes a prepared folder."""
    folder.mkdir()
    names = [
        f"data-{number:05d}-of-{len(shards):05d}.array_record" for number in range(len(shards))
    ]
    for name, records in zip(names, shards):
        writer = ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")
        for record in records:
            writer.write(encode_record(record))
        writer.close()
    index = {
        "format": 1,
        "records": sum(map(len, shards)),
        "shards": [{"file": name, "records": len(records)} for name, records in zip(names, shards)],
        "skipped": {},
        "source": {},
    }
    (folder / "index.json").write_text(json.dumps(index))


def write_all(folder: pathlib.Path) -> dict[str, SourceConfig]:
    """Writes a source of every kind."""
    pictures = write_pictures(folder)
    write_json(folder / "chats.json", CHATS)
    write_json(folder / "chats.jsonl", CHATS)
    write_json(folder / "pairs.json", PAIRS)
    write_rlaif(folder / "rows.parquet", [rlaif_row(number) for number in range(100)], 40)
    examples = [
        {
            "image": [io.BytesIO(pictures[file]) for file in files_of(entry)],
            "conversations": entry["conversations"],
        }
        for entry in CHATS
    ]
    made = write_tfds(
        folder,
        {"image": tfds.features.Sequence(tfds.features.Image()), "conversations": MESSAGES},
        examples,
    )
    write_prepared(folder / "prepared", [chat_records(pictures)[:2], chat_records(pictures)[2:]])
    difficulty = SceneDifficulty(grid=4, min_objects=2, max_objects=5, shapes=6, colours=6)
    scenes = prepare(
        folder / "scenes", train=0, crowd=0, preference=3, test=0, difficulty=difficulty
    )
    images = str(folder)
    return {
        "chat": SourceConfig("chat", f"{folder}/chats.json", images),
        "lines": SourceConfig("chat", f"{folder}/chats.jsonl", images),
        "preference": SourceConfig("preference", f"{folder}/pairs.json", images),
        "rlaif": SourceConfig("rlaif", f"{folder}/rows.parquet"),
        "tfds": SourceConfig("tfds", made, split="train"),
        "prepared": SourceConfig("prepared", f"{folder}/prepared"),
        "scenes": SourceConfig("scenes", str(scenes), split="preference"),
    }
