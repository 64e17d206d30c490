"""Forms of chats and pairs, and what the keys of an entry mean: read, of no use, or refused."""

import base64
import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from source_files import (
    MESSAGES,
    gpt,
    human,
    png,
    rlaif_row,
    write_json,
    write_pictures,
    write_tfds,
)

from mod_jax.config import ConfigError, SourceConfig
from mod_jax.data.sources.kinds import open_source
from mod_jax.data.sources.record import BadSample, Record

CHAT = {"id": "c", "image": "a.png", "conversations": [human("<image>\nQ"), gpt("A")]}
TEXT_ONLY = {"id": "t", "conversations": [human("Q"), gpt("A")]}


def user(text):
    """A message in the other form."""
    return {"role": "user", "content": text}


def assistant(text):
    """A message of the model in the other form."""
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(tmp_path):
    """Reads one entry as a record, with pictures a.png and b.png at hand."""
    write_pictures(tmp_path)

    def read_one(entry: dict, kind: str = "chat", **options) -> Record:
        write_json(tmp_path / "one.jsonl", [entry])
        config = SourceConfig(kind, str(tmp_path / "one.jsonl"), str(tmp_path), **options)
        return open_source(config)[0]

    return read_one


def refused(read, entry, message, kind="chat"):
    with pytest.raises(BadSample, match=message) as raised:
        read(entry, kind)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


# Pictures


@pytest.mark.parametrize("names", ["a.png", ["a.png"]])
@pytest.mark.parametrize("key", ["image", "images"])
def test_pictures_are_read_under_image_and_images(read, tmp_path, key, names):
    entry = {key: names, **TEXT_ONLY, "conversations": CHAT["conversations"]}
    assert read(entry).images == (tmp_path / "a.png",)


def test_several_pictures_keep_their_order(read, tmp_path):
    entry = TEXT_ONLY | {
        "images": ["b.png", "a.png"],
        "image": None,
        "conversations": [human("<image><image>"), gpt("A")],
    }
    assert read(entry).images == (tmp_path / "b.png", tmp_path / "a.png")
    refused(read, entry | {"image": "a.png"}, "image and images have different values")


@pytest.mark.parametrize(
    "key",
    ["image_path", "Image", "imagePath", "IMAGES", "image_paths", "img", "picture", "photos", "pic"]
    + ["image_file", "image_url", "img_name", "file_name", "media", "frames"],
)
def test_a_picture_under_another_key_is_never_dropped(read, key):
    value = ["a.png"] if key == "frames" else "a.png"
    for entry in (TEXT_ONLY, TEXT_ONLY | {"image": None}):
        refused(
            read, entry | {key: value}, f"key '{key}' is not known, .* expected image or images"
        )
    pair = {"question": "Q", "chosen": "A", "rejected": "B", key: value}
    refused(read, pair, f"key '{key}' is not known", "preference")


@pytest.mark.parametrize(
    "key, value",
    [
        ("image_id", 7), ("image_id", "coco-7"), ("image_width", 640), ("num_images", 1),
        ("has_image", True), ("image_path", ""), ("image_path", None), ("video", None),
        ("video", ""), ("videos", []), ("image_caption", "a cat"), ("video_id", "v1"),
    ],
)  # fmt: skip
def test_what_only_describes_pictures_is_no_picture(read, key, value):
    assert read(TEXT_ONLY | {key: value}) == Record("t", (), (("Q", "A"),))


def test_other_keys_beside_the_pictures_describe_them(read, tmp_path):
    found = read(CHAT | {"image_path": "x/a.png", "file_name": "a.png", "url": "http://x/a.png"})
    assert found == read(CHAT)
    assert found.unused == ("image_path", "file_name", "url")


@pytest.mark.parametrize("key", ["video", "videos", "video_path", "audio", "Audio", "speech"])
def test_videos_and_sounds_are_refused_by_name(read, key):
    for entry in (CHAT, TEXT_ONLY):
        refused(read, entry | {key: "clip.mp4"}, f"key '{key}' is not supported: only pictures are")


@pytest.mark.parametrize(
    "left", ["<video>", "<audio>", "<Video>", "<|video_pad|>", "<video_1>", "<speech>"]
)
def test_a_placeholder_of_what_is_not_supported_is_no_text(read, left):
    for question, answer in ((f"{left}\nQ", "A"), ("Q", f"A {left}")):
        entry = TEXT_ONLY | {"conversations": [human(question), gpt(answer)]}
        refused(read, entry, "in a text: only pictures are supported")
    refused(read, TEXT_ONLY | {"system": left}, "in a text: only pictures are supported")


def test_html_about_videos_is_text(read):
    turn = ("Write HTML.", '<video>\n<source src="a.mp4">\n</video>')
    entry = TEXT_ONLY | {"conversations": [human(turn[0]), gpt(turn[1])]}
    assert read(entry).turns == (turn,)


@pytest.mark.parametrize("value", ["", None, {"bytes": None, "path": None}])
def test_a_null_picture_is_none_only_where_markers_say_so(read, value):
    assert read(TEXT_ONLY | {"image": value}) == Record("t", (), (("Q", "A"),))
    refused(read, CHAT | {"image": value}, "picture token without picture: 1 tokens, 0 pictures")
    for prompt in ("question", "prompt"):
        pair = {prompt: "Q", "chosen": "A", "rejected": "B"}
        assert read(pair | {"image": []}, "preference").images == ()
        refused(read, pair | {"image": value}, "image is empty", "preference")
        refused(read, pair | {"images": [value]}, "image is neither|picture", "preference")


@pytest.mark.parametrize("value, message", [
    ({"bytes": "", "path": ""}, "image is neither"),
    ({"bytes": "not base64", "path": None}, "image is neither"),
    (["a.png", ""], "image is neither"),
    (True, "image is neither"),
])  # fmt: skip
def test_a_picture_of_another_type_is_refused(read, value, message):
    refused(read, CHAT | {"image": value}, message)


@pytest.mark.parametrize("form", ["data URL", "base64", "lines", "unpadded", "bytes"])
def test_a_picture_in_base64_is_decoded(read, form):
    picture = png("red")
    text = base64.b64encode(picture).decode()
    value = {
        "data URL": f"data:image/png;base64,{text}",
        "base64": text,
        "lines": "\n".join([text[:76], text[76:]]),
        "unpadded": text.rstrip("="),
        "bytes": {"bytes": text, "path": "none.png"},
    }[form]
    assert read(CHAT | {"image": value}).images == (picture,)


@pytest.mark.parametrize("value, message", [
    ("data:image/png;base64,....", "a data URL without a picture in base64"),
    ("data:image/svg+xml,<svg/>", "a data URL without a picture in base64"),
    ("<" + "x" * 100_000, "a text of 100001 characters, neither a file name nor a picture"),
    (base64.b64encode(b"text " * 20_000).decode(), "a text of 133336 characters, neither"),
    ("x/" * 1000 + "a.png", "no such picture|outside|too long"),
])  # fmt: skip
def test_long_texts_in_place_of_a_picture_are_quoted_briefly(read, value, message):
    if len(value) > 4096 or value.startswith("data:"):
        refused(read, CHAT | {"image": value}, message)
    else:
        assert str(read(CHAT | {"image": value}).images[0]).endswith("a.png")


# Messages


@pytest.mark.parametrize("entry", [
    {"conversations": [{"from": "system", "value": " S "}, human("Q"), gpt("A")]},
    {"messages": [{"role": "system", "content": "S"}, user("Q"), assistant("A")]},
    {"system": "S", "conversations": [human("Q"), gpt("A")]},
    {"system_prompt": "S", "messages": [user("Q"), assistant("A")]},
    {"system_message": "S", "system": "", "conversations": [human("Q"), gpt("A")]},
    {"system": "S", "conversations": [{"from": "system", "value": "S"}, human("Q"), gpt("A")]},
])  # fmt: skip
def test_a_system_text_is_read_wherever_it_stands(read, entry):
    assert read({"id": "s"} | entry) == Record("s", (), (("Q", "A"),), system="S")


@pytest.mark.parametrize("entry, message", [
    ({"system": "S", "conversations": [{"from": "system", "value": "T"}, human("Q"), gpt("A")]},
     "two system texts: 'S', 'T'"),
    ({"conversations": [human("Q"), {"from": "system", "value": "T"}, gpt("A")]},
     "a system text that does not stand first"),
    ({"system": ["S"], "conversations": [human("Q"), gpt("A")]}, r"system text \['S'\]"),
    ({"System": "S", "conversations": [human("Q"), gpt("A")]}, "key 'System' is not known"),
    ({"sys_text": "S", "conversations": [human("Q"), gpt("A")]}, "key 'sys_text' is not known"),
    ({"system": "<image>", "conversations": [human("Q"), gpt("A")]},
     "picture token in the system text"),
    ({"tools": '[{"name": "f"}]', "conversations": [human("Q"), gpt("A")]}, "key 'tools' carries"),
    ({"conversations": [human("Q"), gpt("A")], "messages": [user("R"), assistant("B")]},
     "conversations and messages have different values"),
    ({"conversations": [human("Q") | {"role": "assistant"}, gpt("A")]}, "from and role have diff"),
    ({"conversations": [human("Q") | {"image": "a.png"}, gpt("A")]}, "key 'image' is not known"),
    ({"messages": [user("Q"), assistant("A") | {"tool_calls": [{}]}]}, "key 'tool_calls' carries"),
    ({"Conversations": [human("Q"), gpt("A")]}, "key 'Conversations' is not known"),
    ({"instruction": "Q", "output": "A"},
     "a chat without conversations or messages: it has instruction, output"),
])  # fmt: skip
def test_what_cannot_be_used_is_named(read, entry, message):
    refused(read, entry, message)


def test_content_in_parts_is_joined_as_the_template_joins_it(read, tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "Q"}, {"type": "image", "image": "b.png"}]
    entry = {"messages": [user(parts[1:]), assistant([{"type": "text", "text": "A"}])]}
    assert read(entry) == Record("0", (tmp_path / "b.png",), (("Q\n<image>", "A"),))
    entry = {"images": ["a.png"], "messages": [user(parts[:2]), assistant("A")]}
    assert read(entry) == Record("0", (tmp_path / "a.png",), (("<image>\nQ", "A"),))
    url = {"url": f"data:image/png;base64,{base64.b64encode(png('red')).decode()}"}
    entry = {"messages": [user([{"type": "image_url", "image_url": url}]), assistant("A")]}
    assert read(entry).images == (png("red"),)
    refused(read, {"messages": [user([{"type": "video", "video": "v"}])]}, "part .*'video'")
    mixed = {"images": ["a.png"], "messages": [user(parts), assistant("A")]}
    refused(read, mixed, "pictures both in the messages and beside them")


@pytest.mark.parametrize(
    "key, off", [("loss", False), ("weight", 0), ("weight", 0.0), ("train", 0)]
)
def test_a_turn_that_is_not_learnt_is_read_as_that(read, key, off):
    entry = {
        "conversations": [
            human("Q") | {"weight": 0},
            gpt("A") | {key: off},
            human("R") | {"loss": None},
            gpt("B") | {key: type(off)(1)},
        ]
    }
    assert read(entry) == Record("0", (), (("Q", "A"), ("R", "B")), unlearnt=(0,))


@pytest.mark.parametrize("messages, message", [
    ([human("Q"), gpt("A") | {"weight": 0.5}], "weight of a turn is 0.5: expected 0 or 1"),
    ([human("Q"), gpt("A") | {"loss": "false"}], "loss of a turn is 'false': expected 0 or 1"),
    ([human("Q") | {"loss": True}, gpt("A")], "loss of a question is True: only answers"),
    ([human("Q"), gpt("A") | {"loss": False}], "no answer is learnt"),
])  # fmt: skip
def test_weights_that_cannot_be_kept_are_named(read, messages, message):
    refused(read, {"conversations": messages}, message)
    refused(read, TEXT_ONLY | {"loss": False}, "key 'loss' says that the record is not learnt")


def test_keys_that_carry_nothing_are_noted(read):
    entry = CHAT | {"score": 0.9, "source": "coco", "empty": None, "tags": ["a"]}
    messages = [human("<image>\nQ") | {"time": 3}, gpt("A") | {"time": 4, "rating": "good"}]
    found = read(entry | {"conversations": messages})
    assert found == read(CHAT)
    assert found.unused == (
        "score",
        "source",
        "tags",
        "rating of a message",
        "time of a message",
    )


# Pairs

ASKED = {"image": "a.png"}
PAIR = Record("0", (), (("<image>Q", "good"),), "bad")
FORMS = {
    "prompt and texts": {"prompt": "<image>Q", "chosen": "good", "rejected": "bad"},
    "question and texts": {"question": "<image>Q", "chosen": "good", "rejected": "bad"},
    "prompt and messages": {
        "prompt": [user("<image>Q")],
        "chosen": [assistant("good")],
        "rejected": [assistant(" bad")],
    },
    "roles": {
        "chosen": [user("<image>Q"), assistant("good")],
        "rejected": [user("<image>Q "), assistant("bad")],
    },
    "conversations and messages": {
        "conversations": [human("<image>Q")],
        "chosen": gpt("good"),
        "rejected": gpt("bad"),
    },
    "conversations and texts": {
        "conversations": [human("<image>Q")],
        "chosen": "good",
        "rejected": "bad",
    },
    "prompt and whole conversations": {
        "prompt": "<image>Q",
        "chosen": [user("<image>Q"), assistant("good")],
        "rejected": [user("<image>Q"), assistant("bad")],
    },
    "messages and a rejected response": {
        "messages": [user("<image>Q"), assistant("good")],
        "rejected_response": "bad",
    },
    "parts": {
        "chosen": [user([{"type": "image"}]), assistant("good")],
        "rejected": [user([{"type": "image"}]), assistant("bad")],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_pairs_are_read_as_other_tools_write_them(read, tmp_path, form):
    found = read(FORMS[form] | ASKED, "preference")
    question = "<image>" if form == "parts" else "<image>Q"
    assert found == Record("0", (tmp_path / "a.png",), ((question, "good"),), "bad")


@pytest.mark.parametrize("prompt", ["prompt", "question"])
def test_a_prompt_without_a_marker_has_its_pictures_in_front(read, prompt):
    entry = {prompt: "Q", "chosen": "good", "rejected": "bad", "images": ["a.png", "b.png"]}
    found = read(entry, "preference")
    assert (len(found.images), found.turns) == (2, (("<image>\n<image>\nQ", "good"),))
    assert read(entry, "preference", text_only=True).turns == (("Q", "good"),)


def test_a_pair_has_earlier_turns_and_a_system_text(read):
    before = [human("Q"), gpt("A"), human("R")]
    system = {"from": "system", "value": "S"}
    expected = Record("0", (), (("Q", "A"), ("R", "good")), "bad", system="S")
    for entry in (
        {"system": "S", "conversations": before, "chosen": "good", "rejected": "bad"},
        {"chosen": [system, *before, gpt("good")], "rejected": [system, *before, gpt("bad")]},
        {"prompt": [system, *before], "chosen": [gpt("good")], "rejected": [gpt("bad")]},
        {
            "prompt": [system, *before],
            "chosen": [*before, gpt("good")],
            "rejected": [*before, gpt("bad")],
        },
    ):
        assert read(entry, "preference") == expected


def whole(question, answer):
    return [human(question), gpt(answer)]


@pytest.mark.parametrize("entry, message", [
    ({"chosen": whole("Q", "A"), "rejected": whole("Q", "A")},
     "chosen and rejected are the same text: 'A'"),
    ({"chosen": whole("Q", "A b"), "rejected": whole("Q", " A  b\n")}, "are the same text: 'A  b'"),
    ({"question": "Q", "chosen": "A.", "rejected": "A ."}, "are the same text"),
    ({"chosen": whole("Q one", "A"), "rejected": whole("Q two", "B")},
     "chosen and rejected have different human turns: 'Q one' and 'Q two'"),
    ({"chosen": [*whole("Q", "A"), *whole("R", "A")], "rejected": whole("Q", "B")},
     "have different human turns: 2 and 1 of them"),
    ({"chosen": [*whole("Q", "A"), *whole("R", "A")],
      "rejected": [*whole("Q", "C"), *whole("R", "B")]},
     "have different earlier answers: 'A' and 'C'"),
    ({"chosen": [{"from": "system", "value": "S"}, *whole("Q", "A")], "rejected": whole("Q", "B")},
     "have different system texts: 'S' and ''"),
    ({"prompt": "Q", "chosen": whole("R", "A"), "rejected": whole("R", "B")},
     "the prompt and the beginning of an answer's conversation differ: 'Q', 'R'"),
    ({"prompt": "Q", "chosen": "A"}, "a pair without rejected or rejected_response: it has prompt"),
    ({"chosen": "A", "rejected": "B"}, "a pair without conversations or messages or prompt"),
    ({"prompt": "Q", "response_a": "A", "response_b": "B"}, "a pair without rejected"),
    ({"prompt": "Q", "Chosen": "A", "rejected": "B"},
     "key 'Chosen' is not known: expected 'chosen'"),
    ({"prompt": "Q", "chosen": gpt("A") | {"loss": False}, "rejected": "B"}, "no answer is learnt"),
    ({"prompt": "Q", "chosen": [], "rejected": []}, "turns|answer"),
    ({"prompt": "Q", "chosen": "", "rejected": "B"}, "chosen or rejected without an answer text"),
    ({"prompt": 3, "chosen": "A", "rejected": "B"}, "conversation is not a list"),
])  # fmt: skip
def test_pairs_say_why_they_are_bad(read, entry, message):
    refused(read, entry, message, "preference")


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_is_no_chat_and_says_which_kind_reads_it(tmp_path, form):
    """Once for a file of pairs; by name for a pair among chats."""
    write_pictures(tmp_path)
    config = SourceConfig("chat", str(tmp_path / "some.json"), str(tmp_path))
    for count in (1, 200):
        write_json(tmp_path / "some.json", [FORMS[form] | ASKED] * count)
        with pytest.raises(
            ConfigError,
            match=r"data\.sources\.kind = 'chat': expected 'preference' for .*some\.json, which "
            r"holds pairs .*--kind=preference",
        ):
            open_source(config)
    write_json(tmp_path / "some.json", [CHAT, FORMS[form] | ASKED])
    source = open_source(config)
    assert source[0].turns
    with pytest.raises(BadSample, match="of a preference pair, which only kind = 'preference'"):
        source[1]


@pytest.mark.parametrize("where", ["id", "role", "text", "key", "picture"])
def test_what_a_user_wrote_is_quoted_briefly(read, tmp_path, where):
    long = "x" * 100_000
    entry, kind = {
        "id": (CHAT | {"id": long, "conversations": []}, "chat"),
        "role": (CHAT | {"conversations": [{"from": long, "value": "Q"}, gpt("A")]}, "chat"),
        "text": ({"chosen": whole(f"Q {long}", "A"), "rejected": whole(long, "B")}, "preference"),
        "key": (TEXT_ONLY | {f"image_{long}": "a.png"}, "chat"),
        "picture": (CHAT | {"image": f"../{long[:4000]}"}, "chat"),
    }[where]
    refused(read, entry, ".", kind)
    source = open_source(SourceConfig(kind, str(tmp_path / "one.jsonl"), str(tmp_path)))
    assert len(source.name(0)) <= 80


# The same keys in parquet and TFDS


def test_columns_of_parquet_mean_what_keys_mean(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        rlaif_row(0) | {"system": "S", "image_path": "x/0.jpg", "video": None},
        rlaif_row(1) | {"system": None, "image_path": None, "video": "v.mp4"},
        rlaif_row(2, image=None) | {"system": None, "image_path": "x/2.jpg", "video": None},
        rlaif_row(3) | {"system": "", "image_path": "", "video": ""},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = open_source(SourceConfig("rlaif", str(tmp_path / "rows.parquet")))
    assert [source[number].system for number in (0, 3)] == ["S", ""]
    assert source[0].unused == ("image_path", "ds_name", "idx")
    for number, message in ((1, "key 'video' is not supported"), (2, "key 'image_path' is not")):
        with pytest.raises(BadSample, match=message):
            source[number]


def test_lists_of_pictures_are_a_column_too(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = rlaif_row(0)
    pictures = [{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}]
    row = {key: row[key] for key in ("question", "chosen", "rejected")} | {"images": pictures}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (record,) = open_source(SourceConfig("rlaif", str(tmp_path / "rows.parquet")))
    assert record.images == (png("red"), png("blue"))
    assert record.turns[0][0] == "<image>\n<image>\nWhat is 0?"


def test_features_of_tfds_mean_what_keys_mean(tmp_path):
    text = tfds.features.Text()
    messages = tfds.features.Sequence(
        {"from": text, "value": text, "loss": np.bool_, "time": np.int64}
    )
    turns = [
        human("Q") | {"loss": False, "time": 1},
        gpt("A") | {"loss": False, "time": 2},
        human("R") | {"loss": False, "time": 3},
        gpt("B") | {"loss": True, "time": 4},
    ]
    examples = [
        {"conversations": turns, "system": "S", "video": "", "score": 1.0},
        {"conversations": turns, "system": "", "video": "v.mp4", "score": 1.0},
    ]
    features = {"conversations": messages, "system": text, "video": text, "score": np.float32}
    folder = write_tfds(tmp_path, features, examples)
    source = open_source(SourceConfig("tfds", folder, split="train"))
    assert source[0] == Record("0", (), (("Q", "A"), ("R", "B")), system="S", unlearnt=(0,))
    assert set(source[0].unused) == {"score", "time of a message"}
    with pytest.raises(BadSample, match="key 'video' is not supported"):
        source[1]


def test_an_empty_picture_of_tfds_is_none_that_is_there(tmp_path):
    import io

    text = tfds.features.Text()
    image = tfds.features.Image()
    empty = {"image": io.BytesIO(b"")}
    pair = {"question": "Q", "chosen": "A", "rejected": "B"}
    features = {"question": text, "chosen": text, "rejected": text, "image": image}
    chat = {"conversations": [human("Q"), gpt("A")]}
    for number, (has, example) in enumerate(
        [(features, pair | empty), ({"conversations": MESSAGES, "image": image}, chat | empty)]
    ):
        (tmp_path / str(number)).mkdir()
        folder = write_tfds(tmp_path / str(number), has, [example])
        with pytest.raises(BadSample, match="image is empty: 0 bytes"):
            open_source(SourceConfig("tfds", folder, split="train"))[0]


def test_prepared_records_keep_the_system_text_and_what_is_learnt(tmp_path):
    from source_files import write_prepared

    records = [
        Record("a", (), (("Q", "A"), ("R", "B")), system="S", unlearnt=(0,)),
        Record("b", (), (("Q", "A"),)),
    ]
    write_prepared(tmp_path / "prepared", [records])
    source = open_source(SourceConfig("prepared", str(tmp_path / "prepared")))
    assert list(source) == records


def test_reports_of_a_json_file_name_it_whole(tmp_path):
    """A surrogate in a key does not break the message."""
    path = pathlib.Path(tmp_path, "a.jsonl")
    path.write_text(json.dumps(TEXT_ONLY | {"video\ud800": "x"}))
    with pytest.raises(BadSample, match="is not supported") as raised:
        open_source(SourceConfig("chat", str(path)))[0]
    str(raised.value).encode()
