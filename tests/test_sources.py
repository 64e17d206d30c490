"""Every kind of source, against plain reads of the same files.

A fault makes a single record bad, or stops the run with a clear error.
"""

import dataclasses
import io
import json
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import grain
import msgpack
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from source_files import (
    CHATS,
    MESSAGES,
    chat_records,
    gpt,
    human,
    pair_records,
    png,
    rlaif_row,
    write_all,
    write_json,
    write_pictures,
    write_prepared,
    write_rlaif,
    write_tfds,
)

from mod_jax.config import ConfigError, SourceConfig
from mod_jax.data.sources.kinds import open_source
from mod_jax.data.sources.prepared import decode_record, encode_record
from mod_jax.data.sources.record import BadSample, Record

KINDS = ("chat", "lines", "preference", "rlaif", "tfds", "prepared", "scenes")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("sources"))


def read_all(source) -> list[Record]:
    return [source[number] for number in range(len(source))]


def faults(source) -> dict[str, str]:
    """Reads all records, and returns name -> reason of the bad ones."""
    found = {}
    for number in range(len(source)):
        try:
            source[number]
        except BadSample as error:
            found[source.name(number)] = str(error)
    return found


def refused(config: SourceConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_source(config)


# Every kind


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_named_as_they_are_and_numbers_end(configs, kind):
    source = open_source(configs[kind])
    names = [source.name(number) for number in range(len(source))]
    assert names == [record.id for record in source]  # iteration ends with IndexError
    with pytest.raises(IndexError):
        source[len(source)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_moves_stays_itself(configs, kind, tmp_path):
    before = open_source(configs[kind])
    path = pathlib.Path(configs[kind].path)
    if path.is_dir():
        moved = shutil.copytree(path, tmp_path / "moved")
    else:
        moved = shutil.copy(path, tmp_path / path.name)
    after = open_source(dataclasses.replace(configs[kind], path=str(moved)))
    assert after.identity == before.identity
    assert after.identity["records"] == len(before)


@pytest.mark.parametrize("kind", ["lines", "rlaif"])
def test_a_source_that_grows_is_another(configs, kind, tmp_path):
    path = pathlib.Path(configs[kind].path)
    file = path if path.is_file() else min(path.glob("*.parquet"))
    changed = tmp_path / "files"
    changed.mkdir()
    copy = changed / file.name
    if kind == "lines":
        copy.write_bytes(file.read_bytes() + b"\n" + file.read_bytes().splitlines()[0])
        found = open_source(dataclasses.replace(configs[kind], path=str(copy)))
    else:
        shutil.copy(file, copy)
        shutil.copy(file, changed / f"again_{file.name}")
        found = open_source(dataclasses.replace(configs[kind], path=str(changed)))
    before = open_source(configs[kind]).identity
    assert found.identity["records"] != before["records"]
    assert found.identity["checksum"] != before["checksum"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_a_random_access_source_of_grain(configs, kind):
    source = open_source(configs[kind])
    assert isinstance(source, grain.sources.RandomAccessDataSource)
    numbers = list(reversed(range(len(source))))
    data = grain.MapDataset.source(source).map(lambda record: record.id)
    assert [data[number] for number in numbers] == [source.name(number) for number in numbers]


@pytest.mark.parametrize("kind", ["chat", "lines", "preference", "rlaif", "prepared"])
def test_a_source_imports_only_what_its_kind_needs(configs, kind):
    """Neither jax, nor TFDS, nor pyarrow unless it reads parquet."""
    code = """
import sys
from mod_jax.config import SourceConfig
from mod_jax.data.sources.kinds import open_source
open_source(SourceConfig(*sys.argv[1:]))[0]
heavy = ("jax", "tensorflow", "tensorflow_datasets", "pyarrow", "array_record")
print(*[name for name in heavy if name in sys.modules])
"""
    config = configs[kind]
    command = [sys.executable, "-c", code, config.kind, config.path, config.images]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    needed = {"rlaif": ["pyarrow"], "prepared": ["array_record"]}
    assert ended.stdout.split() == needed.get(kind, [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_travels_after_use_and_small(configs, kind):
    source = open_source(configs[kind])
    records = read_all(source)
    sent = pickle.dumps(source)
    assert len(sent) < 6000
    assert read_all(pickle.loads(sent)) == records


def test_another_process_reads_the_same(configs):
    sources = [open_source(config) for config in configs.values()]
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        assert list(process.map(read_all, sources)) == [read_all(source) for source in sources]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_read_at_once(configs, kind):
    source = open_source(configs[kind])
    records = read_all(source)
    numbers = random.Random(0).choices(range(len(source)), k=200)
    unopened = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(unopened.__getitem__, numbers))
    assert read == [records[number] for number in numbers]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_alone_have_no_pictures_and_no_markers(configs, kind):
    whole = open_source(configs[kind])
    texts = open_source(dataclasses.replace(configs[kind], text_only=True))
    for record, text in zip(whole, texts, strict=True):
        turns = tuple(
            (question.replace("<image>", "").strip(), answer) for question, answer in record.turns
        )
        assert text == Record(record.id, (), turns, record.rejected)


@pytest.mark.parametrize("kind", ["chat", "lines", "preference"])
@pytest.mark.parametrize("images", ["", "/no/such/folder"])
def test_texts_alone_do_not_open_the_place_of_the_pictures(configs, kind, images):
    config = dataclasses.replace(configs[kind], text_only=True)
    without = open_source(dataclasses.replace(config, images=images))
    assert read_all(without) == read_all(open_source(config))


def test_texts_alone_of_parquet_do_not_need_its_pictures(tmp_path):
    row = {key: rlaif_row(0)[key] for key in ("question", "chosen", "rejected")}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "texts.parquet")
    config = SourceConfig("rlaif", str(tmp_path / "texts.parquet"), text_only=True)
    assert [record.turns for record in open_source(config)] == [(("What is 0?", "good 0"),)]


def test_sources_know_whether_they_hold_pairs_and_configurations_of_most_kinds_do(configs):
    pairs = {
        "chat": False,
        "lines": False,
        "preference": True,
        "rlaif": True,
        "tfds": False,
        "prepared": False,
        "scenes": True,
    }
    assert {kind: open_source(config).holds_pairs for kind, config in configs.items()} == pairs
    unknown = {"tfds": None, "prepared": None}  # only the data say it
    assert {kind: config.holds_pairs for kind, config in configs.items()} == pairs | unknown


# Chats and pairs as JSON


@pytest.mark.parametrize("kind", ["chat", "lines"])
def test_chats_have_pictures_anywhere_several_or_none(configs, kind):
    assert read_all(open_source(configs[kind])) == chat_records(paths(configs[kind].images))


def test_pairs_are_conversations_or_plain_texts(configs):
    assert read_all(open_source(configs["preference"])) == pair_records(
        paths(configs["preference"].images)
    )


def paths(folder: str) -> dict[str, pathlib.Path]:
    return {name: pathlib.Path(folder, name) for name in ("a.png", "b.png")}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_record_that_is_no_utf8_is_bad_alone(tmp_path, suffix):
    path = tmp_path / f"chats.{suffix}"
    write_json(
        path, [{"id": name, "conversations": [human("Q"), gpt(f"ü{name}")]} for name in "abc"]
    )
    path.write_bytes(path.read_bytes().replace("üb".encode(), b"\xff\xfe["))
    source = open_source(SourceConfig("chat", str(path)))
    assert [source[number].turns[0][1] for number in (0, 2)] == ["üa", "üc"]
    ((name, reason),) = faults(source).items()
    assert name == "1" and "can't decode byte 0xff" in reason


def test_a_broken_line_is_bad_alone(tmp_path):
    good = json.dumps({"id": "good", "conversations": [human("Q"), gpt("A")]})
    (tmp_path / "chats.jsonl").write_text(
        "\n".join([good, good[:-9], "[" * 100_000, '"text"', good])
    )
    found = faults(open_source(SourceConfig("chat", str(tmp_path / "chats.jsonl"))))
    assert list(found) == ["1", "2", "3"]
    assert (
        found["1"].startswith("not JSON: ")
        and found["2"].startswith("not JSON: ")
        and found["3"] == "record is not a JSON object"
    )


@pytest.mark.parametrize("entry, reason", [
    ({"image": 3}, "image is neither a file name nor a list of file names"),
    ({"image": ["a.png", None]}, "image is neither"),
    ({"image": {"bytes": "x"}}, "image is neither"),
    ({"image": "../a.png"}, "picture outside of data.sources.images: '../a.png'"),
    ({"image": "/etc/passwd"}, "picture outside of data.sources.images"),
    ({"conversations": [human("Q"), {"from": [], "value": "A"}]}, "unknown speaker []"),
    ({"conversations": [human("Q"), gpt("\ud83d")]}, r"unpaired surrogate in the text ('\ud83d')"),
])  # fmt: skip
def test_bad_chats_say_why(tmp_path, entry, reason):
    path = tmp_path / "chats.jsonl"
    path.write_text(
        json.dumps({"id": "bad \udc80", "conversations": [human("<image>"), gpt("A")]} | entry)
    )
    ((name, why),) = faults(open_source(SourceConfig("chat", str(path), str(tmp_path)))).items()
    assert name == r"bad \udc80" and why.startswith(reason)


@pytest.mark.parametrize("entry, reason", [
    ({"question": "Q", "chosen": "A"},
     "a pair without rejected or rejected_response: it has question, chosen"),
    ({"question": "Q", "rejected": "A"}, "a pair without chosen: it has question, rejected"),
    ({"question": None, "chosen": "A", "rejected": "B"},
     ("a pair without conversations or messages or prompt or question: "
      "it has question, chosen, rejected")),
    ({"question": "Q", "chosen": "A", "rejected": " "},
     "chosen or rejected without an answer text"),
    ({"question": "<image> <image>", "chosen": "A", "rejected": "B", "image": "a.png"},
     "picture token without picture: 2 tokens, 1 pictures"),
])  # fmt: skip
def test_bad_plain_pairs_say_why(tmp_path, entry, reason):
    write_json(tmp_path / "pairs.json", [entry])
    assert faults(
        open_source(SourceConfig("preference", str(tmp_path / "pairs.json"), str(tmp_path)))
    ) == {"0": reason}


def test_a_json_file_that_is_gone_or_changed_is_not_taken_for_the_first(tmp_path):
    path = tmp_path / "chats.json"
    write_json(path, CHATS)
    sent = pickle.dumps(open_source(SourceConfig("chat", str(path), str(tmp_path))))
    write_json(path, CHATS[1:])
    for change in (lambda: None, path.unlink):
        change()
        source = pickle.loads(sent)
        with pytest.raises(
            ConfigError,
            match=r"data\.sources\.path = '.*chats\.json': expected the file that existed when",
        ):
            source[0]
        assert source.name(0) == "0"


def test_a_folder_of_pictures_that_vanishes_stops_the_run_by_name(tmp_path):
    (tmp_path / "images").mkdir()
    write_json(tmp_path / "chats.json", CHATS)
    source = open_source(
        SourceConfig("chat", str(tmp_path / "chats.json"), str(tmp_path / "images"))
    )
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(
        ConfigError,
        match=r"data\.sources\.images = '.*/images': expected the folder that existed when",
    ):
        source[0]


# RLAIF-V's parquet


def rlaif_records(path) -> list[Record]:
    rows = pq.read_table(path).to_pylist()
    return [
        Record(
            f"{path.name}:{number}",
            (row["image"]["bytes"],),
            (("<image>\n" + row["question"], row["chosen"]),),
            row["rejected"],
        )
        for number, row in enumerate(rows)
    ]


def test_rlaif_is_a_file_a_folder_or_a_pattern(tmp_path):
    (tmp_path / "other.txt").write_text("other")
    for name, rows, group in (("b", 70, 33), ("a", 100, 100), ("c", 1, 1)):
        path = tmp_path / f"{name}.parquet"
        write_rlaif(path, [rlaif_row(number) for number in range(rows)], group)
    everything = [
        record for name in "abc" for record in rlaif_records(tmp_path / f"{name}.parquet")
    ]
    for path, records in (
        (tmp_path, everything),
        (tmp_path / "*.parquet", everything),
        (tmp_path / "[bc].parquet", everything[100:]),
        (tmp_path / "c.parquet", everything[-1:]),
    ):
        assert read_all(open_source(SourceConfig("rlaif", str(path)))) == records
    source = open_source(SourceConfig("rlaif", str(tmp_path)))
    numbers = random.Random(0).choices(range(171), k=100)
    assert [source[number] for number in numbers] == [everything[number] for number in numbers]


def test_a_question_has_its_picture_in_front_unless_it_says_where(tmp_path):
    rows = [rlaif_row(0, question="Q <image>"), rlaif_row(1, question=" Q")]
    write_rlaif(tmp_path / "rows.parquet", rows, 10)
    source = open_source(SourceConfig("rlaif", str(tmp_path / "rows.parquet")))
    assert [(record.turns[0][0], len(record.images)) for record in source] == [
        ("Q <image>", 1),
        ("<image>\nQ", 1),
    ]


def test_a_picture_that_is_not_there_is_never_no_picture(tmp_path):
    """A path without bytes is looked for where the configuration says."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png("red"))
    pictures = [
        {"bytes": None, "path": "images/a.png"},
        {"bytes": b"", "path": "images/a.png"},
        {"bytes": None, "path": "images/none.png"},
        None,
        {"bytes": None, "path": None},
        {"bytes": b"", "path": None},
    ]
    rows = [rlaif_row(number, image=picture) for number, picture in enumerate(pictures)]
    path = tmp_path / "rows.parquet"
    write_rlaif(path, rows, 10)
    found = open_source(SourceConfig("rlaif", str(path), str(tmp_path)))
    assert [found[number].images[0].read_bytes() for number in range(2)] == [png("red")] * 2
    assert found[2].images == (tmp_path / "images/none.png",)  # bad when it is decoded
    null = "image is empty, and no marker in the question says that it may be"
    assert faults(found) == {
        "rows.parquet:3": null,
        "rows.parquet:4": null,
        "rows.parquet:5": "image is empty: 0 bytes",
    }
    nowhere = faults(open_source(SourceConfig("rlaif", str(path))))
    assert nowhere["rows.parquet:0"] == (
        "picture 'images/a.png', but no data.sources.images to find it in"
    )
    assert len(nowhere) == 6


def test_rows_without_texts_are_bad_by_name(tmp_path):
    write_rlaif(
        tmp_path / "rows.parquet",
        [rlaif_row(0), rlaif_row(1, chosen=None), rlaif_row(2, rejected="")],
        2,
    )
    assert faults(open_source(SourceConfig("rlaif", str(tmp_path / "rows.parquet")))) == {
        "rows.parquet:1": "a pair without chosen: it has image, question, chosen, rejected",
        "rows.parquet:2": "chosen or rejected without an answer text",
    }


def test_other_parquet_is_refused(tmp_path):
    pq.write_table(
        pa.table({"question": ["Q"], "chosen": ["A"], "image": [png("red")]}),
        tmp_path / "other.parquet",
    )
    refused(
        SourceConfig("rlaif", str(tmp_path / "other.parquet")),
        r"other\.parquet': expected the columns question, chosen, rejected, image \(or images\); "
        "it has question, chosen, image",
    )
    write_rlaif(tmp_path / "cut.parquet", [rlaif_row(0)], 1)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-20])
    refused(
        SourceConfig("rlaif", str(tmp_path / "cut.parquet")),
        r"cut\.parquet': expected a whole parquet file",
    )
    refused(
        SourceConfig("rlaif", str(tmp_path / "*.arrow")),
        "expected a parquet file, a folder of them, or a pattern that matches some",
    )
    write_rlaif(tmp_path / "empty.parquet", [], 1)
    refused(SourceConfig("rlaif", str(tmp_path / "empty.parquet")), "at least one row")


def test_a_corrupt_stretch_of_parquet_is_bad_and_the_other_groups_are_read(tmp_path):
    path = tmp_path / "rows.parquet"
    write_rlaif(path, [rlaif_row(number) for number in range(30)], 10)
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    found = faults(open_source(SourceConfig("rlaif", str(path))))
    assert list(found) == [f"rows.parquet:{number}" for number in range(10, 20)]
    assert all(reason.startswith("unreadable row: ") for reason in found.values())


def test_a_parquet_file_of_one_row_group_is_streamed(tmp_path):
    path = tmp_path / "rows.parquet"
    picture = random.Random(0).randbytes(100_000)
    rows = [
        rlaif_row(number, image={"path": "", "bytes": picture + bytes([number])})
        for number in range(200)
    ]
    write_rlaif(path, rows, 1000, use_dictionary=False, write_batch_size=10)
    source = open_source(SourceConfig("rlaif", str(path)))
    before = pa.total_allocated_bytes()
    peak = 0
    for number in range(200):
        assert source[number].images[0][-1] == number
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 1_000_000 < peak < 12_000_000 < path.stat().st_size


def test_rows_in_about_their_order_are_read_once(tmp_path, monkeypatch):
    write_rlaif(tmp_path / "rows.parquet", [rlaif_row(number) for number in range(200)], 1000)
    source = open_source(SourceConfig("rlaif", str(tmp_path / "rows.parquet")))
    opened = []
    real = pq.ParquetFile

    def counted(*arguments, **options):
        opened.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(pq, "ParquetFile", counted)
    for number in range(0, 200, 20):
        for near in random.Random(number).sample(range(number, number + 20), 20):
            assert source[near].rejected == f"bad {near}"
    assert len(opened) == 1


# TFDS

TEXT = tfds.features.Text()
PICTURE = tfds.features.Image()


def test_a_data_set_of_chats_is_read(configs):
    pictures = {"a.png": png("red"), "b.png": png("blue")}
    records = [
        dataclasses.replace(record, id=str(number))
        for number, record in enumerate(chat_records(pictures))
    ]
    assert read_all(open_source(configs["tfds"])) == records


@pytest.mark.parametrize(
    "features, example",
    [
        (
            {"chosen": MESSAGES, "rejected": MESSAGES},
            {
                "chosen": [human("<image>\nQ"), gpt("A")],
                "rejected": [human("<image>\nQ"), gpt("B")],
            },
        ),
        (
            {"question": TEXT, "chosen": TEXT, "rejected": TEXT, "extra": PICTURE},
            {
                "question": "Q",
                "chosen": "A",
                "rejected": "B",
                "extra": io.BytesIO(png("blue")),
            },
        ),
    ],
)
def test_data_sets_of_pairs_are_read(tmp_path, features, example):
    folder = write_tfds(
        tmp_path,
        features | {"id": tfds.features.Scalar(np.int64), "image": PICTURE},
        [example | {"id": 7, "image": io.BytesIO(png("red"))}],
    )
    assert read_all(open_source(SourceConfig("tfds", folder, split="train"))) == [
        Record("7", (png("red"),), (("<image>\nQ", "A"),), "B")
    ]


def test_a_data_set_is_found_by_its_name(tmp_path, monkeypatch):
    folder = write_tfds(
        tmp_path,
        {"id": TEXT, "conversations": MESSAGES},
        [{"id": "ü", "conversations": [human("Q"), gpt("A")]}],
    )
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    name = pathlib.Path(folder).parent.name
    assert read_all(open_source(SourceConfig("tfds", name, split="train"))) == [
        Record("ü", (), (("Q", "A"),))
    ]


def test_other_data_sets_are_refused_with_what_they_hold(tmp_path):
    folder = write_tfds(tmp_path, {"caption": TEXT}, [{"caption": "c"}])
    refused(
        SourceConfig("tfds", folder, split="train"),
        r"expected a data set with the features conversations, or .*; "
        r"it has FeaturesDict\(\{ 'caption': Text",
    )
    folder = write_tfds(
        tmp_path, {"conversations": MESSAGES, "image": TEXT}, [{"conversations": [], "image": "c"}]
    )
    refused(SourceConfig("tfds", folder, split="train"), "it has .*'image': Text")
    refused(
        SourceConfig("tfds", folder, split="test"),
        r"data\.sources\.split = 'test': expected one of \['train'\]",
    )
    refused(
        SourceConfig("tfds", str(tmp_path), split="train"),
        "expected the folder or the name of a prepared TFDS data set",
    )
    refused(
        SourceConfig("tfds", "no_such_data", split="train"),
        r"data\.sources\.path = 'no_such_data': expected the folder or the name of a prepared",
    )


def test_a_data_set_that_cannot_be_read_by_number_is_refused(tmp_path):
    folder = write_tfds(
        tmp_path, {"conversations": MESSAGES}, [{"conversations": [human("Q"), gpt("A")]}]
    )
    info = pathlib.Path(folder, "dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    refused(
        SourceConfig("tfds", folder, split="train"),
        r"expected array_record, found .*\. Prepare it with: tfds build --file_format=array_record",
    )


# Prepared folders


def test_prepared_records_are_what_was_prepared(configs):
    assert read_all(open_source(configs["prepared"])) == chat_records(
        {"a.png": png("red"), "b.png": png("blue")}
    )


def test_a_record_is_encoded_as_a_plain_map_with_its_pictures(tmp_path):
    write_pictures(tmp_path)
    record = Record("r", (tmp_path / "a.png", b"x"), (("<image><image>ü", "A"), ("Q", "B")), "C")
    data = encode_record(record)
    assert msgpack.unpackb(data) == {
        "id": "r",
        "turns": [["<image><image>ü", "A"], ["Q", "B"]],
        "rejected": "C",
        "images": [png("red"), b"x"],
    }
    assert decode_record(data) == dataclasses.replace(record, images=(png("red"), b"x"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"x" * 50,
        msgpack.packb([1, 2]),
        msgpack.packb({"id": "a"}),
        msgpack.packb({"id": "a", "turns": [["q"]], "images": [], "rejected": ""}),
    ],
)
def test_other_bytes_are_no_record(data):
    with pytest.raises(BadSample, match="not a prepared record: "):
        decode_record(data)


@pytest.fixture
def prepared(tmp_path):
    records = [
        Record(f"r{number}", (random.Random(number).randbytes(3000),), (("<image>", "A"),))
        for number in range(100)
    ]
    write_prepared(tmp_path / "prepared", [records[:60], records[60:]])
    return tmp_path / "prepared"


def test_a_folder_without_an_index_is_not_whole(prepared):
    (prepared / "index.json").unlink()
    refused(
        SourceConfig("prepared", str(prepared)),
        r"expected a complete prepared folder; index\.json, which is written last, is missing\. "
        r"Make it with: python -m mod_jax\.prepare",
    )
    refused(SourceConfig("prepared", str(prepared / "none")), "expected an existing local folder")


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"records": 99}, {"shards": []}, {"shards": [{"file": "x"}]}]
)
def test_an_index_of_another_form_is_refused(prepared, change):
    index = json.loads((prepared / "index.json").read_text())
    (prepared / "index.json").write_text(json.dumps(index | change))
    refused(
        SourceConfig("prepared", str(prepared)),
        "expected an index of format 1 with at least one record",
    )


def test_an_index_that_is_cut_is_refused(prepared):
    (prepared / "index.json").write_text('{"format": 1, ')
    refused(SourceConfig("prepared", str(prepared)), "expected an index of format 1")


@pytest.mark.parametrize("left", [None, 0, 100_000])
def test_a_shard_that_is_cut_or_missing_is_refused_by_name(prepared, left):
    shard = prepared / "data-00001-of-00002.array_record"
    if left is None:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:left])
    refused(
        SourceConfig("prepared", str(prepared)),
        r"complete shards, as its index lists them; "
        r"data-00001-of-00002\.array_record has 0 records, not 40\. Copy it again",
    )


def test_a_corrupt_record_of_a_shard_is_bad_alone(prepared):
    shard = prepared / "data-00000-of-00002.array_record"
    data = shard.read_bytes()
    at = data.index(b"r17") + 200
    shard.write_bytes(data[:at] + bytes(9) + data[at + 9 :])
    found = faults(open_source(SourceConfig("prepared", str(prepared))))
    assert list(found) == ["17"] and found["17"].startswith("unreadable record: Corrupted")


def test_a_prepared_folder_that_vanishes_stops_the_run(prepared):
    sent = pickle.dumps(open_source(SourceConfig("prepared", str(prepared))))
    shutil.rmtree(prepared)
    source = pickle.loads(sent)
    with pytest.raises(
        ConfigError,
        match=r"data\.sources\.path = '.*prepared': expected the folder that existed when",
    ):
        source[0]
    assert source.name(0) == "0"


# Memory


def resident() -> float:
    """Resident memory of this process in MB."""
    return psutil.Process().memory_info().rss / 1e6


@pytest.mark.parametrize("count", [10_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_memory_is_flat_however_many_samples_are_read(tmp_path, count):
    entry = {"conversations": [human("Q " * 100), gpt("A " * 300)]}
    write_json(tmp_path / "chats.json", ({"id": f"{number}"} | entry for number in range(count)))
    before = resident()
    source = open_source(SourceConfig("chat", str(tmp_path / "chats.json")))
    opened = resident()
    for number in range(count):
        source[number]
    assert opened - before < 60 and resident() - opened < 3, (
        "opening needs one window of the file, and reading keeps nothing"
    )
