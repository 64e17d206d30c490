"""--dry-run counts what is there, names what training would skip, and writes nothing."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from small_sources import prepare_here

from mod_jax.config import (
    ConfigError,
    ModelConfig,
    RecipeConfig,
    SourceConfig,
    VisionConfig,
    from_dict,
)
from mod_jax.data.batches.pipeline import Batches
from mod_jax.data.batches.skips import TooManyBadSamples
from mod_jax.data.batches.statistics import SourceStatistics, packing, survey
from mod_jax.data.prepare.plan import make_plan
from mod_jax.data.samples.sample import Skipped
from mod_jax.data.samples.tokenizer import load_tokenizer, scenes_tokenizer, text_encoder
from mod_jax.data.samples.tokens import chat_format, tokenize
from mod_jax.data.sources.kinds import open_source
from mod_jax.report import dry_run

ROOT = pathlib.Path(__file__).parents[1]
VISION = {
    "image_size": 24,
    "patch_size": 12,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_layers": 2,
    "num_heads": 2,
}
DECODER = {
    "vocab_size": 80,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_layers": 1,
    "num_heads": 1,
    "num_kv_heads": 1,
    "head_dim": 8,
}
RECORDS = 90  # in chats.json
FEW = 30  # in few.json
LENGTH = 48  # positions of a row
MISSING = 7  # numbers of the bad records: no picture file,
BROKEN = 20  # a picture that is cut off,
UNANSWERED = 33  # and an empty answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """chats.json: no picture, one or two; answers of 1 to 60 words; three bad records.

    few.json: its first FEW good records.
    """
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    scenes_tokenizer().save_pretrained(folder / "tokenizer")
    for number in set(range(RECORDS)) - {MISSING}:
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / f"{BROKEN}.png").write_bytes((folder / "0.png").read_bytes()[:500])
    words = rng.integers(1, 60, RECORDS)

    def record(i: int) -> dict:
        pictures = 1 if i in (MISSING, BROKEN) else i % 3
        answer = "" if i == UNANSWERED else " ".join(["one"] * words[i])
        turns = [
            {"from": "human", "value": "<image>" * pictures + "how many?"},
            {"from": "gpt", "value": answer},
        ]
        return {"id": f"chat-{i}", "image": [f"{i}.png"] * pictures, "conversations": turns}

    records = [record(i) for i in range(RECORDS)]
    few = [record(i) for i in range(FEW + 2) if i not in (MISSING, BROKEN)]
    (folder / "chats.json").write_text(json.dumps(records))
    (folder / "few.json").write_text(json.dumps(few))
    return folder


def recipe(folder, **changes) -> dict:
    """Stage `whole` reads both files, with `changes` to its data; stage `good` reads few.json."""

    def source(name: str, weight: float) -> dict:
        return {"path": f"{folder}/{name}.json", "images": str(folder), "weight": weight}

    data = {
        "sources": (source("chats", 3.0), source("few", 1.0)),
        "sequence_length": LENGTH,
        "images_per_row": 4,
        "samples_per_row": 8,
        "template": "brief",
        "look_ahead": 8,
    }
    stage = {
        "trains": ("adaptor.*",),
        "objective": {},
        "data": data | changes,
        "steps": 100,
        "rows": 4,
    }
    other = stage | {"data": data | {"sources": (source("few", 1.0),)}}
    student = {
        "random": {"vision": VISION, "decoder": DECODER, "image_token_id": 1, "end_token_id": 0}
    }
    return {
        "name": "data",
        "tokenizer": f"{folder}/tokenizer",
        "student": student,
        "stages": {"whole": stage, "good": other},
        "order": ("whole", "good"),
    }


def measure(folder, decode=True, **changes) -> tuple[RecipeConfig, list[SourceStatistics], list]:
    """The recipe, statistics of stage `whole`, and the (source, records, outcome) reported."""
    config = from_dict(RecipeConfig, recipe(folder, **changes))
    model = ModelConfig(VisionConfig(**VISION), image_token_id=1, end_token_id=0)
    reported = []
    statistics = survey(
        config.stages["whole"].data,
        load_tokenizer(config.tokenizer),
        model,
        decode,
        lambda *report: reported.append(report),
    )
    return config, statistics, reported


def test_sources_are_counted_as_they_are(folder):
    config, found, reported = measure(folder)
    tokenizer = load_tokenizer(config.tokenizer)
    encoder = text_encoder(tokenizer)
    chat = chat_format("brief", config.student.random, tokenizer)
    bad = {0: {MISSING, BROKEN, UNANSWERED}, 1: set()}
    for number, statistics in enumerate(found):
        source = open_source(statistics.config)
        samples = {
            i: tokenize(source[i], encoder, chat, LENGTH)
            for i in range(len(source))
            if i not in bad[number]
        }
        sizes = {i: tuple(size) for i, size in enumerate(statistics.sizes.tolist()) if size[0]}
        assert sizes == {i: (len(s.tokens), s.num_pictures) for i, s in samples.items()}
        assert statistics.answers == sum(int(s.loss_weights.sum()) for s in samples.values())
        assert statistics.truncated == sum(bool(s.truncated) for s in samples.values()) > 0
    assert [records for _, records, _ in reported] == [RECORDS] * RECORDS + [FEW] * FEW


def test_skipped_samples_are_named_with_their_reason(folder):
    _, found, reported = measure(folder)
    whole, few = found
    bad = [(n, f"chat-{n}") for n in (MISSING, BROKEN, UNANSWERED)]
    assert [(s.number, s.name) for s in whole.skipped] == bad and not few.skipped
    assert [s.reason.partition(":")[0] for s in whole.skipped] == [
        "no such picture file",
        "unreadable picture",
        "question without an answer text",
    ]
    skipped = [outcome for *_, outcome in reported if isinstance(outcome, Skipped)]
    assert skipped == list(whole.skipped)


def test_without_decoding_bad_pictures_are_not_found(folder):
    assert [s.number for s in measure(folder, decode=False)[1][0].skipped] == [UNANSWERED]


@pytest.mark.parametrize("streams", [1, 4])
def test_padding_is_that_of_training(folder, streams):
    config, found, _ = measure(folder, streams=streams, max_bad_share=0.1)
    data = config.stages["whole"].data
    packed = packing(data, found)
    batches = Batches(data, load_tokenizer(config.tokenizer), config.student.random, 4)
    trained = [next(batches) for _ in range(100)][20:]
    assert packed.padding == pytest.approx(
        np.mean([batch.segment_ids == 0 for batch in trained]), abs=0.01
    )
    assert packed.samples_a_row == pytest.approx(
        np.mean([(batch.samples >= 0).sum(1) for batch in trained]), rel=0.02
    )


def fact(text: str, name: str) -> str:
    """The value on the line "NAME: VALUE" of a report."""
    start = f"{name}: "
    line = next(line for line in text.splitlines() if line.startswith(start))
    return line.removeprefix(start)


def test_the_report(folder, capsys):
    config = from_dict(RecipeConfig, recipe(folder))
    assert not dry_run.run(config, ("whole",)) and dry_run.run(config, ("good",))
    whole, good = capsys.readouterr().out.split("stage good")
    _, found, _ = measure(folder)
    missing = f"{folder}/{MISSING}.png"
    assert (
        f"skipped {folder}/chats.json record {MISSING} (chat-{MISSING}): "
        f"no such picture file: {missing}" in whole
    )
    assert fact(whole, "skipped") == "3 of 120 records, 2.50%; data.max_bad_share = 1.00%: TOO MANY"
    assert fact(good, "skipped") == "0 of 30 records, 0.00%; data.max_bad_share = 1.00%"
    tokens = sum(s.sizes[:, 0].sum() for s in found)
    answers = sum(s.answers for s in found)
    assert fact(whole, "tokens per epoch") == f"{tokens:,}, of which {answers:,} are answer tokens"
    data = config.stages["whole"].data
    packed = packing(data, found)
    assert fact(whole, "rows") == (
        f"{packed.samples_a_row:.2f} samples per row, "
        f"{packed.padding:.1%} of the {LENGTH} positions are padding"
    )
    twice = packing(dataclasses.replace(data, sequence_length=2 * LENGTH, images_per_row=8), found)
    assert fact(whole, "padding of longer rows").endswith(f", {twice.padding:.1%} of {2 * LENGTH}")
    assert fact(whole, "steps per epoch") == f"{117 / packed.samples_a_row / 4:.1f} of 4 rows"
    row = next(
        line for line in whole.splitlines() if line.strip().startswith(f"{folder}/chats.json")
    ).split()
    assert row[1:5] == ["90", "3", str(found[0].truncated), str(found[0].sizes[:, 1].sum())]
    assert row[7] == "75.0%"
    epochs = 100 * 4 * packed.samples_a_row * 0.75 / 87  # in 100 steps
    assert float(row[9]) == pytest.approx(epochs, abs=0.01)
    bars = {
        int(line.split()[0]): int(line.split()[-1])
        for line in whole.partition("pictures per sample")[2].splitlines()[1:]
        if line[:8].strip().isdigit()
    }
    pictures = np.concatenate([s.used for s in found])[:, 1]
    assert bars == dict(enumerate(np.bincount(pictures).tolist()))


def test_a_source_without_a_usable_record_is_reported(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a long path would be broken into lines
    (tmp_path / "bad.json").write_text(json.dumps([{"id": "x", "conversations": []}]))
    sources = [
        {"path": "bad.json"},
        {"path": f"{folder}/few.json", "images": f"{folder}"},
    ]
    config = from_dict(RecipeConfig, recipe(folder, sources=sources))
    assert not dry_run.run(config, ("whole",))
    row = next(
        line
        for line in capsys.readouterr().out.splitlines()
        if line.split()[:1] == [sources[0]["path"]]
    ).split()
    assert row[1:3] == ["1", "1"] and row[8:] == ["0.0", "nan"]


def test_unused_keys_are_said_once_a_source_and_prepare_and_training_judge_alike(
    folder, tmp_path, capsys, monkeypatch
):
    """Of 40 records 36 are bad, and the others have a score."""
    monkeypatch.setattr("mod_jax.data.batches.statistics.LEAST_PACKED", 4)
    turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "one"}]
    bad = [{"id": f"b{i}", "conversations": []} for i in range(36)]
    good = [{"id": f"g{i}", "conversations": turns, "score": i} for i in range(4)]
    path = tmp_path / "few.json"
    path.write_text(json.dumps(bad + good))
    config = from_dict(RecipeConfig, recipe(folder, sources=({"path": str(path)},), look_ahead=1))
    assert not dry_run.run(config, ("whole",))
    printed = capsys.readouterr().out
    assert fact(printed, "skipped").startswith("36 of 40 records, 90.00%; data.max_bad_share")
    assert printed.count("not used") == 1
    assert fact(printed, f"source {path}") == "keys not used: score (in 4 of 4 records)"
    plan, source = make_plan(SourceConfig("chat", str(path)), str(tmp_path / "out"))
    tokenizer = load_tokenizer(config.tokenizer)
    for limit, refused in ((0.01, True), (0.89, True), (0.9, False)):
        data = dataclasses.replace(config.stages["whole"].data, max_bad_share=limit)
        stage = dataclasses.replace(config.stages["whole"], data=data)
        other = dataclasses.replace(config, stages={**config.stages, "whole": stage})
        assert dry_run.run(other, ("whole",)) != refused
        expects = pytest.raises if refused else lambda error: contextlib.nullcontext()
        with expects(TooManyBadSamples):
            list(itertools.islice(Batches(data, tokenizer, config.student.random, 4), 4))
        with expects(ConfigError):
            prepare_here(plan, source, max_bad_share=limit)


def test_data_without_a_usable_record_are_reported(folder, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(json.dumps([{"id": "x", "conversations": []}]))
    config = from_dict(RecipeConfig, recipe(folder, sources=({"path": f"{tmp_path}/bad.json"},)))
    assert not dry_run.run(config, ("whole",))
    assert "skipped: 1 of 1 records, 100.00%" in capsys.readouterr().out


def test_the_command_reads_in_worker_processes_and_writes_nothing(folder, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({recipe(folder, workers=1)!r})\n"
    )
    before = sorted(folder.rglob("*")), sorted(tmp_path.rglob("*"))
    command = [
        sys.executable,
        "-B",
        "-m",
        "mod_jax.train",
        f"--config={path}",
        "--dry-run",
        "--stage=whole",
    ]
    done = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert fact(done.stdout, "skipped").startswith("3 of 120 records")
    assert "stage good" not in done.stdout
    assert (sorted(folder.rglob("*")), sorted(tmp_path.rglob("*"))) == before
