"""What the benchmarks compute themselves: FLOPs, ratios, and measured memory."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from small import DENSE, SPARSE, TEACHER, chats, pairs

from benchmarks import compare, flops, measure, models, padding
from benchmarks.sizes import PRESETS, draw
from mod_jax.config import ObjectiveConfig
from mod_jax.models import llava

# Weights of the decoders of `small`, that one token is multiplied with: 2 layers of attention
# (queries and outputs D x D, keys and values half as wide) and of three feed-forward products.
STUDENT = 2 * (3 * 32 * 32 + 3 * 32 * 64)
SPARSE_LAYER = 2 * 3 * 32 * 64 + 32 * 4  # two of four experts, and the router
TEACHER_WEIGHTS = 2 * (2 * 48 * 32 + 2 * 48 * 16 + 3 * 48 * 64)


def counts(batch):
    tokens, pictures = (batch.segment_ids > 0).sum(), (batch.picture_index >= 0).sum() / 4
    return int(tokens), float(pictures), int(batch.loss_weights.sum())


def adaptor(width, pictures):
    return 4 * pictures * 16 * width, 4 * pictures * width * width


def tower(pictures):
    """One of two layers is run: 5 positions, each with 4 D x D and 2 D x 2D; and the patches."""
    return pictures * (5 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 48 * 16)


def test_flops_of_a_student_that_trains_whole_are_six_for_each_weight():
    batch = chats()
    tokens, pictures, read = counts(batch)
    trained = [name for name in llava.abstract(DENSE) if not name.startswith("vision_tower.")]
    found = flops.of_step(ObjectiveConfig("next_token"), DENSE, None, trained, batch)
    first, second = adaptor(32, pictures)
    wanted = 2 * tower(pictures) + 4 * first + 6 * second  # nothing trains below the adaptor
    wanted += 6 * (tokens * STUDENT + read * 80 * 32)
    assert found["dense"] == pytest.approx(wanted)


def test_flops_of_a_frozen_part_are_four_and_of_a_teacher_two():
    batch = pairs()
    tokens, pictures, read = counts(batch)
    trained = [name for name in llava.abstract(SPARSE) if ".moe." in name]
    objective = ObjectiveConfig("preference")
    found = flops.of_step(objective, SPARSE, TEACHER, trained, batch)
    attention_and_dense = STUDENT - 3 * 32 * 64
    wanted = 2 * (tower(pictures) + sum(adaptor(32, pictures)) + sum(adaptor(48, pictures)))
    wanted += tokens * (4 * attention_and_dense + 6 * SPARSE_LAYER + 2 * TEACHER_WEIGHTS)
    wanted += read * (4 * 80 * 32 + 2 * 96 * 48)
    assert found["dense"] == pytest.approx(wanted)


def test_attention_counts_the_pairs_that_see_each_other():
    batch = chats(rows=2)
    found = flops.of_step(
        ObjectiveConfig("next_token"), DENSE, None, ["adaptor.linear_1.b_o"], batch
    )
    lengths = [np.sum(batch.segment_ids == segment, 1) for segment in (1, 2)]
    visible = sum(int(np.sum(n * (n + 1) // 2)) for n in lengths)
    pictures = counts(batch)[1]
    # queries with keys and weights with values: 4 x 8 numbers each, in 2 layers, 3 passes
    wanted = 2 * 2 * 32 * 2 * 3 * visible + 2 * 2 * 16 * 5 * 5 * pictures
    assert found["attention"] == wanted


def record(work, side, seconds, gib, contended=False):
    key = "seconds_a_token" if work == "decode" else "seconds"
    figures = {key: seconds, "processor_seconds": seconds, "peak_gib": gib}
    return {"work": work, "side": side, "contended": contended, **figures}


def test_ratios_are_of_medians_and_memory_is_the_worse_of_both_works():
    records = [record("mimic", "project", seconds, 0.5) for seconds in (1.0, 9.0, 2.0)]
    records += [record("mimic", "authors", 8.0, 5.0), record("mimic", "rows", 3.0, 1.0)]
    records += [
        record("preference", "project", 1.0, 0.9),
        record("preference", "authors", 5.0, 3.0),
    ]
    records += [record("preference", "rows", 2.0, 1.0, contended=True)]
    records += [record("decode", "project", 0.01, 0.1), record("decode", "rows", 0.03, 0.1)]
    found = compare.summary(records)
    assert found["ratios"] == {
        "mimic": {"authors": 4.0, "rows": 1.5},
        "preference": {"authors": 5.0, "rows": 2.0},
        "decode": {"authors": 3.0, "rows": 3.0},
        "memory_above_weights": {"authors": pytest.approx(0.3), "rows": 0.9},
    }
    assert found["contended"]


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_the_peak_above_what_was_resident_before():
    kept = np.ones(2**24)  # 128 MiB, resident before
    found = measure.repeat(lambda: np.ones(2**25).sum(), warmup=0, steps=1)
    assert kept[0] and found["peak_gib"] == pytest.approx(0.25, abs=0.05)
    assert found["resident_gib"] > 0.125


@pytest.mark.parametrize("work", ["mimic", "preference"])
def test_a_batch_holds_every_answer_as_targets_after_its_question(work):
    samples = draw(PRESETS["test"])
    batch = models.batch(work, samples)
    answers = samples.answers[:, :1] if work == "mimic" else samples.answers
    for row, weights in enumerate(batch.loss_weights > 0):
        assert batch.targets[row][weights].tolist() == answers[row].ravel().tolist()
    shared = batch.tokens[:, : samples.questions.shape[1] - 1]
    assert np.array_equal(shared, samples.questions[:, :-1])
    assert batch.tokens.shape[1] % models.MULTIPLE == 0


@pytest.mark.slow
@pytest.mark.parametrize("module", ["step", "decode", "ops"])
def test_a_command_writes_its_figures(tmp_path, module):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--preset=test", "--steps=2"]
    subprocess.run([*command, f"--json={tmp_path}/out.json"], check=True)
    assert "seconds" in (tmp_path / "out.json").read_text()


@pytest.mark.parametrize(("samples", "used"), [(1, 1000), (2, 2000)])
def test_padding_of_rows_with_at_most_so_many_samples(samples, used):
    sizes = np.array([[1000, 1]] * 64, np.int32)
    assert padding.padding_of_pipeline(sizes, 2048, samples=samples) == 1 - used / 2048
