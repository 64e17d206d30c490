"""The stream of Batches: order, mixture, resumption, bad samples, and scenes end to end."""

import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from mod_jax.batch import Batch
from mod_jax.config import ConfigError, DataConfig, ModelConfig, SourceConfig, VisionConfig
from mod_jax.data.pipeline import BAD, GOOD, Skips, TooManyBadSamples, chat_format, load_sample, make_dataset
from mod_jax.data.scenes import SceneDifficulty, prepare
from mod_jax.data.sources import open_source
from mod_jax.data.tokenizer import scenes_tokenizer, text_encoder

TOKENIZER = scenes_tokenizer()
VISION = VisionConfig(image_size=48, patch_size=12, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2)
MODEL = ModelConfig(VISION, image_token_id=TOKENIZER.convert_tokens_to_ids("<image>"), end_token_id=TOKENIZER.eos_token_id)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return str(prepare(tmp_path_factory.mktemp("scenes"), train=60, crowd=10, preference=40, test=10, difficulty=SceneDifficulty(grid=4, min_objects=2, max_objects=5, shapes=6, colours=6)))


def scene_data(path, *splits, **options):
    sources = tuple(SourceConfig("scenes", path, split=split) for split in splits)
    return DataConfig(sources, **{"sequence_length": 240, "images_per_row": 4, "samples_per_row": 4, "template": "brief"} | options)


def texts(tmp_path, answers, **options):
    """A text-only source with one record an answer; an empty answer is a bad record."""
    path = tmp_path / f"{len(answers)}.json"
    turn = [{"from": "human", "value": "how many?"}]
    path.write_text(json.dumps([{"id": f"r{i}", "conversations": [*turn, {"from": "gpt", "value": a}]} for i, a in enumerate(answers)]))
    return SourceConfig("chat", str(path), **options)


def batches(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def assert_equal(a: Batch, b: Batch):
    for field in dataclasses.fields(Batch):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


def test_batches_have_the_promised_form(scenes):
    config = scene_data(scenes, "train", "preference")
    sources = [open_source(s) for s in config.sources]
    for batch in batches(make_dataset(config, TOKENIZER, MODEL, rows=3), 6):
        shapes = {f.name: (getattr(batch, f.name).shape, getattr(batch, f.name).dtype) for f in dataclasses.fields(Batch)}
        expected = {f.name: ((3, 240), np.int32) for f in dataclasses.fields(Batch)}
        assert shapes == expected | {"images": ((3, 4, 48, 48, 3), np.uint8), "samples": ((3, 4), np.int32), "loss_weights": ((3, 240), np.float32)}
        assert (batch.targets[batch.loss_weights > 0] != MODEL.image_token_id).all()
        for row in range(3):
            for segment, number in enumerate(batch.samples[row], 1):
                assert (number == -1) == (not (batch.segment_ids[row] == segment).any())
            for picture, number in enumerate(batch.samples[row][batch.samples[row] >= 0]):  # one picture a record
                source, local = (sources[0], number) if number < 60 else (sources[1], number - 60)
                np.testing.assert_array_equal(batch.images[row, picture], Image.open(io.BytesIO(source[local].images[0])))
                mine = batch.segment_ids[row] == picture + 1
                index = batch.picture_index[row][mine]
                assert index[index >= 0].tolist() == list(range(16 * picture, 16 * picture + 16))


def test_rows_hold_the_samples_as_they_were_tokenised(scenes):
    config = scene_data(scenes, "preference")
    source, encoder, chat = open_source(config.sources[0]), text_encoder(TOKENIZER), chat_format(config.template, MODEL)
    batch = batches(make_dataset(config, TOKENIZER, MODEL, rows=2), 1)[0]
    for row, segment in itertools.product(range(2), range(4)):
        if batch.samples[row, segment] >= 0:
            sample, _ = load_sample(source, int(batch.samples[row, segment]), encoder, chat, config, 48)
            mine = batch.segment_ids[row] == segment + 1
            for name in ("tokens", "targets", "loss_weights", "positions", "branch_ids"):
                np.testing.assert_array_equal(getattr(batch, name)[row, mine], sample[name], err_msg=name)
    assert set(np.unique(batch.branch_ids)) == {0, 1, 2}


def test_an_epoch_takes_every_record_once_and_the_next_another_order(scenes):
    config = scene_data(scenes, "train", samples_per_row=1, images_per_row=1, sequence_length=112)
    order = np.concatenate([b.samples.ravel() for b in batches(make_dataset(config, TOKENIZER, MODEL, rows=4), 30)])
    assert sorted(order[:60]) == sorted(order[60:]) == list(range(60))
    assert order[:60].tolist() != order[60:].tolist()


def test_the_seed_alone_decides_the_order(scenes):
    first, again = (batches(make_dataset(scene_data(scenes, "train", seed=5), TOKENIZER, MODEL, rows=2), 4) for _ in range(2))
    for a, b in zip(first, again):
        assert_equal(a, b)
    other = batches(make_dataset(scene_data(scenes, "train", seed=6), TOKENIZER, MODEL, rows=2, threads=1), 1)[0]
    assert other.samples.tolist() != first[0].samples.tolist()


@pytest.mark.parametrize("after", [0, 1, 5])
def test_resumption_is_exact(scenes, after):
    dataset = make_dataset(scene_data(scenes, "train", "preference"), TOKENIZER, MODEL, rows=3)
    iterator = iter(dataset)
    for _ in range(after):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    ahead = [next(iterator) for _ in range(3)]
    resumed = iter(make_dataset(scene_data(scenes, "train", "preference"), TOKENIZER, MODEL, rows=3))
    resumed.set_state(state)
    for expected in ahead:
        assert_equal(next(resumed), expected)


def test_sources_are_mixed_by_weight(tmp_path):
    config = DataConfig((texts(tmp_path, ["one"] * 30, weight=3.0), texts(tmp_path, ["two"] * 31, weight=1.0)), sequence_length=16, images_per_row=0,
                        samples_per_row=1, template="brief")
    numbers = np.concatenate([b.samples.ravel() for b in batches(make_dataset(config, TOKENIZER, MODEL, rows=8), 10)])
    assert (numbers < 30).mean() == pytest.approx(0.75, abs=0.03)


def test_processes_share_the_samples(scenes):
    config = scene_data(scenes, "train", samples_per_row=1, images_per_row=1, sequence_length=112)
    halves = [np.concatenate([b.samples.ravel() for b in batches(make_dataset(config, TOKENIZER, MODEL, rows=2, shard=(i, 2)), 15)]) for i in (0, 1)]
    assert sorted(np.concatenate(halves)) == list(range(60))


def test_text_only_streams_have_no_pictures(scenes):
    source = SourceConfig("scenes", scenes, split="train", text_only=True)
    batch = batches(make_dataset(DataConfig((source,), 240, images_per_row=0, samples_per_row=4, template="brief"), TOKENIZER, MODEL, rows=2), 1)[0]
    assert batch.images.shape == (2, 0, 48, 48, 3)
    assert (batch.picture_index == -1).all() and not (batch.tokens == MODEL.image_token_id).any()


def test_bad_samples_are_skipped_named_and_counted_once(tmp_path, caplog):
    answers = ["one"] * 40
    answers[7] = answers[31] = ""
    config = DataConfig((texts(tmp_path, answers),), sequence_length=16, images_per_row=0, samples_per_row=1, template="brief", max_bad_share=0.5)
    skips = Skips(0.5)
    seen = np.concatenate([b.samples.ravel() for b in batches(make_dataset(config, TOKENIZER, MODEL, rows=4, skips=skips), 30)])
    assert sorted(set(seen.tolist())) == [i for i in range(40) if i not in (7, 31)]
    assert skips.bad == {7: "r7: question without an answer text", 31: "r31: question without an answer text"}
    assert skips.seen == 40, "records, through three epochs"
    assert len(caplog.records) == 2 and "skipped record 7 (r7)" in caplog.text
    again = Skips(0.5)
    again.set_state(json.loads(json.dumps(skips.get_state())))
    assert (again.seen, again.bad, again.truncated) == (40, skips.bad, 0)


def test_too_many_bad_samples_stop_the_run(tmp_path):
    config = DataConfig((texts(tmp_path, ["one"] * 80 + [""] * 20),), 16, images_per_row=0, samples_per_row=1, template="brief", max_bad_share=0.05)
    with pytest.raises(TooManyBadSamples, match=r"max_bad_share = 0.05.*without an answer"):
        batches(make_dataset(config, TOKENIZER, MODEL, rows=4), 30)


def test_a_set_without_a_good_record_stops_at_once(tmp_path):
    config = DataConfig((texts(tmp_path, [""] * 3),), 16, images_per_row=0, samples_per_row=1, template="brief", max_bad_share=1.0)
    with pytest.raises(TooManyBadSamples, match="3 of 3"):
        batches(make_dataset(config, TOKENIZER, MODEL, rows=1), 1)


def test_the_share_is_judged_after_fifty_records():
    skips = Skips(0.1)
    for number in range(49):
        skips.note(number, BAD if number < 40 else GOOD, f"r{number}", "why")
    with pytest.raises(TooManyBadSamples, match="41 of 50"):
        skips.note(49, BAD, "r49", "why")


def test_cut_texts_are_counted(tmp_path):
    skips = Skips(0.0)
    config = DataConfig((texts(tmp_path, ["one", "one " * 30]),), 16, images_per_row=0, samples_per_row=1, template="brief")
    lengths = (batches(make_dataset(config, TOKENIZER, MODEL, rows=2, skips=skips), 1)[0].segment_ids > 0).sum(1)
    assert sorted(lengths.tolist()) == [len(TOKENIZER("USER: how many? ASSISTANT: one").input_ids), 16]
    assert skips.truncated == 1 and not skips.bad


def test_a_record_with_more_pictures_than_a_row_is_bad(scenes):
    with pytest.raises(TooManyBadSamples, match="1 pictures, a row holds 0"):
        batches(make_dataset(scene_data(scenes, "test", images_per_row=0), TOKENIZER, MODEL, rows=1), 1)


def test_impossible_configurations_are_refused_at_once(scenes):
    with pytest.raises(ConfigError, match="data.template"):
        make_dataset(scene_data(scenes, "train", template="quen"), TOKENIZER, MODEL, rows=1)
    with pytest.raises(ConfigError, match="data.images_per_row"):
        make_dataset(scene_data(scenes, "train", images_per_row=16), TOKENIZER, MODEL, rows=1)
