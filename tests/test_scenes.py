"""Scenes: pictures, questions, right and wrong answers, and preparing and reading the set."""

import collections
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mod_jax.config import ConfigError
from mod_jax.data.samples.tokenizer import load_tokenizer, scenes_tokenizer
from mod_jax.data.scenes.builder import (
    KINDS,
    SPLITS,
    absent_objects,
    load_scenes,
    make_record,
    named_objects,
    prepare,
    read_objects,
    read_turns,
)
from mod_jax.data.scenes.chats import CHAT, NUMBERS, caption
from mod_jax.data.scenes.drawing import (
    COLOURS,
    SHAPES,
    SceneDifficulty,
    SceneObject,
    coverage,
    draw,
)

EASY = SceneDifficulty(grid=4, min_objects=2, max_objects=5, shapes=6, colours=6)
HARD = SceneDifficulty(grid=5, max_objects=9, jitter=4, shapes=8, colours=8, noise=25)
RED_RING = SceneObject("ring", "red", "large", 0, 1)
SMALL_BLUE_SQUARE = SceneObject("square", "blue", "small", 2, 3)


def truth(kind, question, objects):
    """The right answer, by a second, plain implementation."""
    words = question.replace("<image>", "").strip().lower().rstrip("?.").split()
    if kind == "caption":
        return caption(objects)
    if kind == "count":
        wanted = words[2]
        return NUMBERS[sum(wanted in ("objects", o.shape + "s", o.shape + "es") for o in objects)]
    if kind == "colour":
        (colour,) = [o.colour for o in objects if o.shape == words[-1]]
        return colour
    if kind == "existence":
        return "yes" if any((o.colour, o.shape) == tuple(words[-2:]) for o in objects) else "no"
    first = [o for o in objects if (o.colour, o.shape) == tuple(words[2:4])]
    second = [o for o in objects if (o.colour, o.shape) == tuple(words[-2:])]
    assert len(first) == len(second) == 1, "relations must be between unambiguous objects"
    a = first[0]
    b = second[0]
    holds = {
        "left": a.column < b.column,
        "right": a.column > b.column,
        "above": a.row < b.row,
        "below": a.row > b.row,
    }
    return "yes" if holds[words[4]] else "no"


@pytest.mark.parametrize("difficulty", [EASY, HARD])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(split, difficulty):
    for index in range(200):
        record = make_record(3, split, index, difficulty, habit_share=0.0)
        objects = read_objects(record["objects"])
        for kind, question, answer in read_turns(record["turns"]):
            assert answer == truth(kind, question, objects), (question, objects)


def test_a_chat_has_six_questions_and_one_picture():
    asked = collections.Counter()
    for index in range(300):
        turns = read_turns(make_record(0, "train", index, EASY)["turns"])
        assert [question.count("<image>") for _, question, _ in turns] == [1, 0, 0, 0, 0, 0]
        assert turns[0][1].startswith("<image>\n")
        asked.update(kind for kind, _, _ in turns)
    assert set(asked) == set(KINDS)
    assert asked["caption"] == 300
    # Few questions are replaced by one of a similar kind.
    assert all(abs(asked[kind] - 300 * CHAT.count(kind)) < 90 for kind in KINDS)


def test_yes_and_no_are_balanced_and_half_of_the_absent_objects_are_near_misses():
    answers = collections.Counter()
    near = []
    for index in range(500):
        record = make_record(1, "test", index, EASY)
        objects = read_objects(record["objects"])
        for kind, question, answer in read_turns(record["turns"]):
            if kind in ("existence", "relation"):
                answers[kind, answer] += 1
            if kind == "existence" and answer == "no":
                colour, shape = named_objects(question)[0]
                colours = {o.colour for o in objects}
                shapes = {o.shape for o in objects}
                near.append(colour in colours and shape in shapes)
    for kind in ("existence", "relation"):
        share = answers[kind, "yes"] / (answers[kind, "yes"] + answers[kind, "no"])
        assert share == pytest.approx(0.5, abs=0.07)
    assert 0.4 < np.mean(near) < 0.65


def test_crowd_answers_are_wrong_as_often_as_asked_and_lean_to_yes():
    wrong = []
    false_yes = 0
    false_no = 0
    for index in range(600):
        record = make_record(0, "crowd", index, EASY, wrong_share=0.25, habit_share=0.0)
        objects = read_objects(record["objects"])
        for kind, question, answer in read_turns(record["turns"]):
            right = truth(kind, question, objects)
            wrong.append(answer != right)
            false_yes += answer == "yes" != right
            false_no += answer == "no" != right
            if kind == "caption" and answer != right:
                assert absent_objects(answer, objects), "a wrong caption names an absent object"
    assert np.mean(wrong) == pytest.approx(0.25, abs=0.03)
    assert false_yes > 2.5 * false_no
    for index in range(50):
        record = make_record(0, "crowd", index, EASY, wrong_share=0.0, habit_share=0.0)
        objects = read_objects(record["objects"])
        for kind, question, answer in read_turns(record["turns"]):
            assert answer == truth(kind, question, objects)


def test_captions_by_habit_name_a_companion_that_is_not_there():
    by_habit = []
    for index in range(600):
        record = make_record(0, "train", index, EASY, habit_share=0.7)
        objects = read_objects(record["objects"])
        for kind, question, answer in read_turns(record["turns"]):
            right = truth(kind, question, objects)
            last = objects[-1]
            companion = (last.colour, "circle")
            is_absent = companion not in {(o.colour, o.shape) for o in objects}
            if kind == "caption" and last.shape == "cross" and is_absent:
                by_habit.append(answer != right)
                assert answer == right or absent_objects(answer, objects) == [companion]
            else:
                assert answer == right
    assert len(by_habit) > 60
    assert np.mean(by_habit) == pytest.approx(0.7, abs=0.15)


def test_preference_pairs():
    """A pair is the right caption and one that names an absent object."""
    for index in range(300):
        record = make_record(0, "preference", index, EASY)
        objects = read_objects(record["objects"])
        ((kind, question, chosen),) = read_turns(record["turns"])
        assert kind == "caption"
        assert question == "<image>\nDescribe the picture."
        assert chosen == truth(kind, question, objects)
        assert absent_objects(chosen, objects) == []
        assert len(absent_objects(record["rejected"], objects)) == 1


def test_records_depend_on_seed_split_and_index_alone():
    first = {(split, i): make_record(7, split, i, EASY) for split in SPLITS for i in range(20)}
    again = {key: make_record(7, *key, EASY) for key in reversed(first)}
    assert first == again
    assert len({record["image"] for record in first.values()}) == len(first), (
        "no picture occurs twice, not even across splits"
    )
    assert make_record(8, "train", 0, EASY)["image"] != first["train", 0]["image"]


def test_objects_are_drawn_in_their_cells():
    picture = draw([RED_RING, SMALL_BLUE_SQUARE], np.random.default_rng(0), EASY)
    assert picture.shape == (48, 48, 3)
    assert picture.dtype == np.uint8
    cells = picture.reshape(4, 12, 4, 12, 3).swapaxes(1, 2).astype(int)
    coloured = (np.ptp(cells, axis=-1) > 40).any((2, 3))  # the background is grey
    assert sorted(zip(*np.nonzero(coloured))) == [(0, 1), (2, 3)]
    assert tuple(cells[2, 3, 6, 6]) == COLOURS["blue"]
    assert np.ptp(cells[0, 1, 6, 6]) == 0, "a ring is hollow"


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ(shape):
    others = [coverage(other, 11) for other in SHAPES if other != shape]
    assert min(np.abs(coverage(shape, 11) - other).mean() for other in others) > 0.08
    assert 0.15 < coverage(shape, 11).mean() < 0.95


def test_a_disc_covers_pi_quarters():
    assert coverage("circle", 40).mean() == pytest.approx(np.pi / 4, abs=2e-3)


def test_captions_are_read_back():
    objects = [RED_RING, SMALL_BLUE_SQUARE, SceneObject("circle", "orange", "small", 3, 0)]
    text = caption(objects)
    assert text == "a red ring, a small blue square and a small orange circle"
    assert caption(objects[:1]) == "a red ring"
    assert named_objects(text) == [("red", "ring"), ("blue", "square"), ("orange", "circle")]
    assert absent_objects("A red circle , a red ring and a blue blue square", objects) == [
        ("red", "circle")
    ]
    assert named_objects("red and ring, bluesquare") == []


@pytest.mark.parametrize(
    "wrong",
    [{"max_objects": 17}, {"shapes": 9}, {"colours": 1}, {"sizes": 0}, {"shapes": 2, "colours": 2}],
)
def test_impossible_difficulties_are_refused(wrong):
    with pytest.raises(ConfigError, match="difficulty"):
        SceneDifficulty(**wrong)


def test_the_tokenizer_knows_every_word(tmp_path):
    tokenizer = scenes_tokenizer()
    assert len(tokenizer) % 16 == 0 and len(tokenizer) <= 128
    for split in SPLITS:
        for index in range(150):
            record = make_record(0, split, index, HARD)
            texts = [text for turn in read_turns(record["turns"]) for text in turn[1:]]
            everything = " ".join([*texts, record["rejected"], "USER: ASSISTANT:"])
            assert tokenizer.unk_token_id not in tokenizer(everything).input_ids
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "a red circle, a small blue square and a ring"
    ids = tokenizer("<image>\n" + text + "<|endoftext|>").input_ids
    assert loaded("<image>\n" + text + "<|endoftext|>").input_ids == ids
    assert (ids[0], ids[-1]) == (loaded.convert_tokens_to_ids("<image>"), loaded.eos_token_id)
    assert loaded.decode(ids, skip_special_tokens=True) == text


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_the_command_prepares_a_set(tmp_path):
    options = ["--train", "3", "--crowd", "0", "--preference", "2", "--test", "1"]
    command = [sys.executable, "-m", "mod_jax.data.scenes", "--data_dir", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(load_scenes(done.stdout.split()[-1], "train")) == 3
    with pytest.raises(ConfigError, match="crowd"):
        load_scenes(tmp_path, "crowd")


SIZES = {"train": 12, "crowd": 6, "preference": 6, "test": 4}


def test_prepare_and_load(tmp_path):
    folder = prepare(tmp_path, **SIZES, difficulty=EASY)
    stamp = (folder / "dataset_info.json").stat().st_mtime_ns
    assert prepare(tmp_path, **SIZES, difficulty=EASY) == folder
    assert (folder / "dataset_info.json").stat().st_mtime_ns == stamp, "prepared once"
    for split in SPLITS:
        records = load_scenes(tmp_path, split)
        assert len(records) == SIZES[split]
        made = make_record(0, split, 3, EASY)
        stored = {
            key: value if isinstance(value, bytes) else value.encode()
            for key, value in made.items()
        }
        assert dict(records[3]) == stored
        assert Image.open(io.BytesIO(records[3]["image"])).size == (48, 48)
    with pytest.raises(ConfigError, match="validation"):
        load_scenes(tmp_path, "validation")
    other = prepare(tmp_path, **SIZES, difficulty=HARD)
    assert other != folder
    picture = load_scenes(other, "test")[0]["image"]
    assert Image.open(io.BytesIO(picture)).size == (60, 60)
    with pytest.raises(ConfigError, match="Name one"):
        load_scenes(tmp_path, "train")


def test_a_preparation_that_stopped_halfway_is_not_taken_for_whole(tmp_path, monkeypatch):

    def fails_late(seed, split, index, *rest):
        if split == "crowd":
            raise KeyboardInterrupt
        return make_record(seed, split, index, *rest)

    monkeypatch.setattr("mod_jax.data.scenes.builder.make_record", fails_late)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, **SIZES, difficulty=EASY)
    with pytest.raises(ConfigError, match="python -m mod_jax.data.scenes"):
        load_scenes(tmp_path, "train")
    monkeypatch.undo()
    prepare(tmp_path, **SIZES, difficulty=EASY)
    assert len(load_scenes(tmp_path, "test")) == 4
