"""--dry-run: what it counts is what is there, what it names is what training would skip, and it writes nothing."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mod_jax.config import ModelConfig, RecipeConfig, VisionConfig, from_dict
from mod_jax.data.batches.pipeline import Batches
from mod_jax.data.batches.statistics import SourceStatistics, packing, survey
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
RECORDS, FEW, LENGTH = 90, 30, 48
MISSING, BROKEN, UNANSWERED = 7, 20, 33


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Chats with no picture, one or two; answers of 1 to 60 words; three bad records. And a source of the good ones among the first."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    scenes_tokenizer().save_pretrained(folder / "tokenizer")
    for number in set(range(RECORDS)) - {MISSING}:
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / f"{BROKEN}.png").write_bytes((folder / "0.png").read_bytes()[:500])
    words = rng.integers(1, 60, RECORDS)
    answer = lambda i: "" if i == UNANSWERED else " ".join(["one"] * words[i])
    pictures = lambda i: 1 if i in (MISSING, BROKEN) else i % 3
    record = lambda i: {
        "id": f"chat-{i}",
        "image": [f"{i}.png"] * pictures(i),
        "conversations": [
            {"from": "human", "value": "<image>" * pictures(i) + "how many?"},
            {"from": "gpt", "value": answer(i)},
        ],
    }
    (folder / "chats.json").write_text(json.dumps([record(i) for i in range(RECORDS)]))
    (folder / "few.json").write_text(
        json.dumps([record(i) for i in range(FEW + 2) if i not in (MISSING, BROKEN)])
    )
    return folder


def recipe(folder, **changes) -> dict:
    source = lambda name, weight: {
        "path": f"{folder}/{name}.json",
        "images": str(folder),
        "weight": weight,
    }
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
    config, told = from_dict(RecipeConfig, recipe(folder, **changes)), []
    model = ModelConfig(VisionConfig(**VISION), image_token_id=1, end_token_id=0)
    return (
        config,
        survey(
            config.stages["whole"].data,
            load_tokenizer(config.tokenizer),
            model,
            decode,
            lambda *said: told.append(said),
        ),
        told,
    )


def test_sources_are_counted_as_they_are(folder):
    config, found, told = measure(folder)
    tokenizer, model = load_tokenizer(config.tokenizer), config.student.random
    encoder, chat = text_encoder(tokenizer), chat_format("brief", model, tokenizer)
    bad = {0: {MISSING, BROKEN, UNANSWERED}, 1: set()}
    for number, statistics in enumerate(found):
        source = open_source(statistics.config)
        samples = {
            i: tokenize(source[i], encoder, chat, LENGTH)
            for i in range(len(source))
            if i not in bad[number]
        }
        assert {i: tuple(size) for i, size in enumerate(statistics.sizes.tolist()) if size[0]} == {
            i: (len(s.tokens), s.num_pictures) for i, s in samples.items()
        }
        assert statistics.answers == sum(int(s.loss_weights.sum()) for s in samples.values())
        assert statistics.truncated == sum(bool(s.truncated) for s in samples.values()) > 0
    assert [said[1] for said in told] == [RECORDS] * RECORDS + [FEW] * FEW


def test_skipped_samples_are_named_with_their_reason(folder):
    _, found, told = measure(folder)
    whole, few = found
    assert [(s.number, s.name) for s in whole.skipped] == [
        (n, f"chat-{n}") for n in (MISSING, BROKEN, UNANSWERED)
    ] and not few.skipped
    assert [s.reason.partition(":")[0] for s in whole.skipped] == [
        "no such picture file",
        "unreadable picture",
        "question without an answer text",
    ]
    assert [said[2] for said in told if isinstance(said[2], Skipped)] == list(whole.skipped)


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


def said(text: str, name: str) -> str:
    """What follows a fact's name."""
    return next(line for line in text.splitlines() if line.startswith(name + ": ")).partition(": ")[
        2
    ]


def test_the_report(folder, capsys):
    config = from_dict(RecipeConfig, recipe(folder))
    assert not dry_run.run(config, ("whole",)) and dry_run.run(config, ("good",))
    whole, good = capsys.readouterr().out.split("stage good")
    _, found, _ = measure(folder)
    assert (
        f"skipped {folder}/chats.json record {MISSING} (chat-{MISSING}): no such picture file: {folder}/{MISSING}.png"
        in whole
    )
    assert said(whole, "skipped") == "3 of 120 records, 2.50%; data.max_bad_share = 1.00%: TOO MANY"
    assert said(good, "skipped") == "0 of 30 records, 0.00%; data.max_bad_share = 1.00%"
    assert (
        said(whole, "tokens an epoch")
        == f"{sum(s.sizes[:, 0].sum() for s in found):,}, of which {sum(s.answers for s in found):,} are learnt"
    )
    packed = packing(config.stages["whole"].data, found)
    assert (
        said(whole, "rows")
        == f"{packed.samples_a_row:.2f} samples a row, {packed.padding:.1%} of the {LENGTH} positions padding"
    )
    twice = packing(
        dataclasses.replace(
            config.stages["whole"].data, sequence_length=2 * LENGTH, images_per_row=8
        ),
        found,
    )
    assert said(whole, "padding of longer rows").endswith(f", {twice.padding:.1%} of {2 * LENGTH}")
    assert said(whole, "steps an epoch") == f"{117 / packed.samples_a_row / 4:.1f} of 4 rows"
    row = next(
        line for line in whole.splitlines() if line.strip().startswith(f"{folder}/chats.json")
    ).split()
    assert (
        row[1:5] == ["90", "3", str(found[0].truncated), str(found[0].sizes[:, 1].sum())]
        and row[7] == "75.0%"
    )
    assert float(row[9]) == pytest.approx(100 * 4 * packed.samples_a_row * 0.75 / 87, abs=0.01), (
        "epochs in 100 steps"
    )
    bars = {
        int(line.split()[0]): int(line.split()[-1])
        for line in whole.partition("pictures a sample")[2].splitlines()[1:]
        if line[:8].strip().isdigit()
    }
    assert bars == dict(
        enumerate(np.bincount(np.concatenate([s.used for s in found])[:, 1]).tolist())
    )


def test_nothing_good_at_all_is_said_too(folder, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(json.dumps([{"id": "x", "conversations": []}]))
    config = from_dict(RecipeConfig, recipe(folder, sources=({"path": f"{tmp_path}/bad.json"},)))
    assert not dry_run.run(config, ("whole",))
    assert "skipped: 1 of 1 records, 100.00%" in capsys.readouterr().out


def test_the_command_reads_in_worker_processes_and_writes_nothing(folder, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({recipe(folder, workers=1)!r})\n"
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
    assert (
        said(done.stdout, "skipped").startswith("3 of 120 records")
        and "stage good" not in done.stdout
    )
    assert (sorted(folder.rglob("*")), sorted(tmp_path.rglob("*"))) == before
