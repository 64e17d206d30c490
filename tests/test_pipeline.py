"""Batches of a stage: form, order, mixture, resumption on any number of hosts, and bad samples."""

import dataclasses
import io
import itertools
import json

import numpy as np
import psutil
import pytest
from PIL import Image

from mod_jax.batch import Batch
from mod_jax.config import ConfigError, DataConfig, ModelConfig, SourceConfig, VisionConfig
from mod_jax.data.batches.pipeline import Batches, count_streams
from mod_jax.data.batches.skips import TooManyBadSamples
from mod_jax.data.batches.streams import Counts
from mod_jax.data.samples.tokenizer import scenes_tokenizer, text_encoder
from mod_jax.data.samples.tokens import chat_format, tokenize
from mod_jax.data.scenes.builder import SceneDifficulty, prepare
from mod_jax.data.sources.kinds import open_source

TOKENIZER = scenes_tokenizer()
VISION = VisionConfig(
    image_size=48, patch_size=12, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2
)
MODEL = ModelConfig(
    VISION,
    image_token_id=TOKENIZER.convert_tokens_to_ids("<image>"),
    end_token_id=TOKENIZER.eos_token_id,
)
HARD = SceneDifficulty(grid=4, min_objects=2, max_objects=5, shapes=6, colours=6)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return str(
        prepare(
            tmp_path_factory.mktemp("scenes"),
            train=60,
            crowd=10,
            preference=40,
            test=10,
            difficulty=HARD,
        )
    )


def scene_data(path, *splits, **options):
    """Configures splits of the scenes as sources."""
    sources = tuple(SourceConfig("scenes", path, split=split) for split in splits)
    return DataConfig(
        sources,
        **{
            "sequence_length": 240,
            "images_per_row": 4,
            "samples_per_row": 4,
            "template": "brief",
            "look_ahead": 6,
        }
        | options,
    )


def texts(tmp_path, answers, **options):
    """Writes a text-only source with a record for each answer; an empty answer is a bad record."""
    path = tmp_path / f"{len(answers)}.json"
    question = {"from": "human", "value": "how many?"}
    records = [
        {"id": f"r{i}", "conversations": [question, {"from": "gpt", "value": answer}]}
        for i, answer in enumerate(answers)
    ]
    path.write_text(json.dumps(records))
    return SourceConfig("chat", str(path), **options)


def text_data(*sources, **options):
    """Configures sources of texts, one per row."""
    return DataConfig(
        sources,
        **{
            "sequence_length": 16,
            "images_per_row": 0,
            "samples_per_row": 1,
            "template": "brief",
            "look_ahead": 2,
        }
        | options,
    )


def make(config, rows, shard=(0, 1)):
    return Batches(config, TOKENIZER, MODEL, rows, shard)


def take(config, rows, count, shard=(0, 1)):
    return list(itertools.islice(make(config, rows, shard), count))


def numbers(batches):
    """Returns the numbers of the batches' records, in their order."""
    found = np.concatenate([batch.samples.ravel() for batch in batches])
    return found[found >= 0]


def assert_equal(a: Batch, b: Batch):
    for field in dataclasses.fields(Batch):
        np.testing.assert_array_equal(
            getattr(a, field.name), getattr(b, field.name), err_msg=field.name
        )


def put_together(hosts):
    """Concatenates the hosts' rows to the global batch."""
    fields = [field.name for field in dataclasses.fields(Batch)]
    rows = {name: [getattr(batch, name) for batch in hosts] for name in fields}
    return Batch(**{name: np.concatenate(parts) for name, parts in rows.items()})


def test_batches_have_the_promised_form(scenes):
    config = scene_data(scenes, "train", "preference")
    records = [record for source in config.sources for record in open_source(source)]
    fields = [field.name for field in dataclasses.fields(Batch)]
    expected = dict.fromkeys(fields, ((3, 240), np.int32)) | {
        "images": ((3, 4, 48, 48, 3), np.uint8),
        "samples": ((3, 4), np.int32),
        "loss_weights": ((3, 240), np.float32),
    }
    for batch in take(config, 3, 6):
        arrays = {name: getattr(batch, name) for name in fields}
        assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == expected
        assert (batch.targets[batch.loss_weights > 0] != MODEL.image_token_id).all()
        for row in range(3):
            for segment, number in enumerate(batch.samples[row], 1):
                assert (number == -1) == (not (batch.segment_ids[row] == segment).any())
            # Each record has one picture, so the picture of a segment has its index.
            used = batch.samples[row][batch.samples[row] >= 0]
            for picture, number in enumerate(used):
                expected_image = Image.open(io.BytesIO(records[number].images[0]))
                np.testing.assert_array_equal(batch.images[row, picture], expected_image)
                in_segment = batch.segment_ids[row] == picture + 1
                index = batch.picture_index[row][in_segment]
                assert index[index >= 0].tolist() == list(range(16 * picture, 16 * picture + 16))


def test_rows_hold_the_samples_as_they_were_tokenized(scenes):
    config = scene_data(scenes, "preference")
    source = open_source(config.sources[0])
    encoder = text_encoder(TOKENIZER)
    chat = chat_format(config.template, MODEL, TOKENIZER)
    batch = take(config, 2, 1)[0]
    for row, segment in itertools.product(range(2), range(4)):
        number = int(batch.samples[row, segment])
        if number < 0:
            continue
        sample = tokenize(source[number], encoder, chat, config.sequence_length)
        in_segment = batch.segment_ids[row] == segment + 1
        for name in ("tokens", "targets", "loss_weights", "positions", "branch_ids"):
            made = getattr(batch, name)[row, in_segment]
            np.testing.assert_array_equal(made, getattr(sample, name), err_msg=name)
    assert set(np.unique(batch.branch_ids)) == {0, 1, 2}


def test_an_epoch_takes_every_record_once_and_the_next_epoch_has_another_order(scenes):
    config = scene_data(scenes, "train", samples_per_row=1, images_per_row=1, sequence_length=112)
    order = numbers(take(config, 4, 30))
    assert sorted(order[:60]) == sorted(order[60:]) == list(range(60))
    assert order[:60].tolist() != order[60:].tolist()


def test_an_epoch_of_a_mixture_in_streams_takes_every_record_once(tmp_path):
    """Three streams read two sources of 30 and 60 records, and packing loses none of them.

    The larger source is read twice as often.
    """
    sources = (
        texts(tmp_path, ["one " * (1 + i % 8) for i in range(30)], weight=1.0),
        texts(tmp_path, ["two " * (1 + i % 9) for i in range(60)], weight=2.0),
    )
    config = text_data(*sources, streams=3, samples_per_row=4, sequence_length=40, look_ahead=5)
    streams = [numbers(take(config, 3, 60, (host, 3))) for host in range(3)]
    assert len({len(stream) for stream in streams}) == 3, "the streams pack at different rates"
    # Each stream reads 30 of the 90 records in the first epoch; the last few may still wait.
    first_epochs = [stream[:25] for stream in streams]
    taken = np.concatenate(first_epochs)
    assert len(set(taken.tolist())) == len(taken)
    later = np.concatenate([stream[:36] for stream in streams])
    assert set(later.tolist()) == set(range(90))


def test_sources_of_equal_length_have_different_orders(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    sources = (texts(tmp_path, ["one"] * 50), texts(other, ["one"] * 50))
    order = numbers(take(text_data(*sources, look_ahead=1), 2, 100))
    first = [n for n in order[:100] if n < 50]
    for epoch in (0, 1):
        second = [n - 50 for n in order[100 * epoch :][:100] if n >= 50]
        assert first != second


def test_the_seed_alone_determines_the_order(scenes):
    first, again = (take(scene_data(scenes, "train", seed=5), 2, 4) for _ in range(2))
    for a, b in zip(first, again):
        assert_equal(a, b)
    other = take(scene_data(scenes, "train", seed=6), 2, 1)[0]
    assert other.samples.tolist() != first[0].samples.tolist()


@pytest.mark.parametrize("hosts", [2, 4])
def test_batches_do_not_depend_on_the_number_of_hosts(scenes, hosts):
    config = scene_data(scenes, "train", "preference")
    together = zip(*(take(config, 8, 5, (host, hosts)) for host in range(hosts)))
    for expected, parts in zip(take(config, 8, 5), together, strict=True):
        assert_equal(put_together(parts), expected)


@pytest.mark.parametrize("streams, before, after", [(8, 1, 1), (8, 2, 4), (4, 4, 2)])
def test_resumption_is_exact_on_any_number_of_hosts(scenes, streams, before, after):
    config = scene_data(scenes, "train", "preference", streams=streams)
    whole = make(config, 8)
    for _ in range(3):
        next(whole)
    stopped = [make(config, 8, (host, before)) for host in range(before)]
    states = {}
    for host in stopped:
        for _ in range(3):
            next(host)
        states |= host.get_state()
    assert states == whole.get_state()
    assert list(states) == list(range(streams))
    resumed = [make(config, 8, (host, after)) for host in range(after)]
    for host in resumed:
        host.set_state(states)
    for _ in range(3):
        assert_equal(put_together([next(host) for host in resumed]), next(whole))


def test_streams_divide_over_rows_and_hosts():
    config = DataConfig((SourceConfig(),))
    rows_and_streams = {1: 1, 2: 2, 6: 2, 8: 8, 96: 32, 256: 64}
    assert {rows: count_streams(config, rows, 1) for rows in rows_and_streams} == rows_and_streams
    with pytest.raises(ConfigError, match=r"data.streams = 3: expected a divisor of the 8 rows"):
        count_streams(dataclasses.replace(config, streams=3), 8, 1)
    with pytest.raises(
        ConfigError, match=r"data.streams = 8: expected a multiple of the 3 processes"
    ):
        count_streams(config, 8, 3)


def test_sources_are_mixed_by_weight(tmp_path):
    common = texts(tmp_path, ["one"] * 30, weight=3.0)
    rare = texts(tmp_path, ["two"] * 31, weight=1.0)
    config = text_data(common, rare)
    assert (numbers(take(config, 8, 10)) < 30).mean() == pytest.approx(0.75, abs=0.03)


def test_text_only_streams_have_no_pictures(scenes):
    source = SourceConfig("scenes", scenes, split="train", text_only=True)
    config = DataConfig((source,), 240, images_per_row=0, samples_per_row=4, template="brief")
    batch = take(config, 2, 1)[0]
    assert batch.images.shape == (2, 0, 48, 48, 3)
    assert (batch.picture_index == -1).all()
    assert not (batch.tokens == MODEL.image_token_id).any()


def test_bad_samples_are_skipped_named_and_counted_once(tmp_path, caplog):
    answers = ["one"] * 40
    answers[7] = answers[31] = ""
    batches = make(text_data(texts(tmp_path, answers), max_bad_share=0.5), 4)
    seen = numbers([next(batches) for _ in range(30)])
    assert set(seen.tolist()) == set(range(40)) - {7, 31}
    assert batches.skips.total == Counts(40, 0, 2), "three epochs count each record once"
    assert sorted(record.getMessage() for record in caplog.records) == [
        "skipped record 31 (r31): question without an answer text",
        "skipped record 7 (r7): question without an answer text",
    ]
    again = make(text_data(texts(tmp_path, answers), max_bad_share=0.5), 4)
    again.set_state(batches.get_state())
    assert again.skips.total == batches.skips.total


def test_too_many_bad_samples_stop_the_run(tmp_path):
    """As soon as the whole set is known to hold too many: six of a hundred are more than 5 %."""
    config = text_data(texts(tmp_path, ["one"] * 80 + [""] * 20), max_bad_share=0.05)
    with pytest.raises(
        TooManyBadSamples,
        match=r"[67] of \d\d records are bad, where all are 100, more than data.max_bad_share = "
        r"0.05 allows.*--dry-run names all.*without an answer",
    ):
        take(config, 4, 30)


def test_a_small_set_is_judged_as_a_large_one(tmp_path):
    config = text_data(texts(tmp_path, [""] * 36 + ["one"] * 4))
    with pytest.raises(TooManyBadSamples, match=r"\d+ of \d+ records are bad, where all are 40"):
        take(config, 1, 1)


def test_a_large_set_is_refused_long_before_it_is_read(tmp_path):
    config = text_data(texts(tmp_path, ["one", ""] * 20_000))
    with pytest.raises(TooManyBadSamples, match=r" \d\d records are bad, where all are 40000"):
        take(config, 4, 100)


def test_a_source_that_is_mixed_in_often_does_not_count_for_more(tmp_path):
    """Of all records, 10 of 1020 are bad, but half of what is read comes from the small source."""
    good = texts(tmp_path, ["one"] * 1000)
    small = texts(tmp_path, ["one", ""] * 10)
    batches = make(text_data(good, small), 4)
    while batches.skips.total.bad < 10:
        next(batches)
    assert [count.bad for count in batches.skips.by_source] == [0, 10]
    assert batches.skips.total.seen < 200


def test_a_stretch_of_bad_records_does_not_refuse_an_allowed_share(tmp_path):
    """However they are placed: here nearly all are bad, and that is allowed."""
    batches = make(text_data(texts(tmp_path, [""] * 299 + ["one"]), max_bad_share=1.0), 2)
    assert {int(number) for _ in range(3) for number in next(batches).samples.ravel()} == {299}


def test_counts_of_all_processes_are_judged_together(tmp_path):
    """Each of two processes has one bad record of about fifty."""
    batches = make(text_data(texts(tmp_path, ["one"] * 100)), 4)
    batches.skips.judge([(1, 50)])
    with pytest.raises(TooManyBadSamples, match="2 of 100 records are bad, where all are 100"):
        batches.skips.judge([(2, 100)])


def test_unused_keys_are_counted_once_a_source(tmp_path):
    for name, keys in (("a", {"score": 1, "b": 2}), ("b", {})):
        turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "one"}]
        entries = [{"conversations": turns} | (keys if i % 2 else {}) for i in range(10)]
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    sources = [SourceConfig("chat", f"{tmp_path}/{name}.json") for name in "ab"]
    batches = make(text_data(*sources, workers=1), 4)
    for _ in range(20):
        next(batches)
    batches.close()
    line = f"source {tmp_path}/a.json: keys not used: b, score (in 5 of 10 records)"
    assert batches.skips.unused_keys() == [line]


def test_an_allowed_share_of_bad_samples_never_stops_the_run(tmp_path):
    """However many there are."""
    batches = make(text_data(texts(tmp_path, ["one", "", "two"] * 100), max_bad_share=0.5), 4)
    while batches.skips.total.seen < 300:
        next(batches)
    assert batches.skips.total.bad == 100


@pytest.mark.parametrize("limit", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("records", [1, 40, 700])
def test_a_data_set_without_a_good_record_stops_the_run(tmp_path, records, limit):
    config = text_data(texts(tmp_path, [""] * records), max_bad_share=limit)
    with pytest.raises(TooManyBadSamples, match=rf"(\d+) of \1 records are bad, .*{records}, "):
        take(config, 1, 1)


def pictured(tmp_path, records):
    """Writes a source of so many records with a small picture each."""
    turns = [{"from": "human", "value": "<image> how many?"}, {"from": "gpt", "value": "one"}]
    chats = [{"id": f"r{i}", "image": f"{i}.png", "conversations": turns} for i in range(records)]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    (tmp_path / "images").mkdir()
    for i in range(records):
        Image.new("RGB", (48, 48)).save(tmp_path / "images" / f"{i}.png")
    return SourceConfig("chat", str(tmp_path / "chats.json"), str(tmp_path / "images"))


@pytest.mark.parametrize("limit", [0.01, 1.0])
def test_pictures_that_vanish_in_a_later_epoch_stop_the_run(tmp_path, limit):
    """Their records have already been counted as good."""
    options = {"sequence_length": 32, "images_per_row": 1, "max_bad_share": limit}
    batches = make(text_data(pictured(tmp_path, 20), **options), 2)
    for _ in range(20):
        next(batches)
    assert batches.skips.total == Counts(20, 0, 0)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with pytest.raises(TooManyBadSamples, match=r"The last \d+ samples are all bad.*\d+.png"):
        list(itertools.islice(batches, 100))


def test_a_folder_that_vanishes_stops_the_run_at_once(tmp_path):
    batches = make(text_data(pictured(tmp_path, 20), sequence_length=32, images_per_row=1), 2)
    next(batches)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"data.sources.images = '{tmp_path}/images'"):
        list(itertools.islice(batches, 100))


def test_cut_texts_are_counted(tmp_path):
    batches = make(text_data(texts(tmp_path, ["one", "one " * 30])), 2)
    lengths = {int(length) for _ in range(4) for length in (next(batches).segment_ids > 0).sum(1)}
    assert sorted(lengths) == [len(TOKENIZER("USER: how many? ASSISTANT: one").input_ids), 16]
    assert batches.skips.total == Counts(2, 1, 0)


def test_a_record_with_more_pictures_than_a_row_is_bad(scenes):
    with pytest.raises(
        TooManyBadSamples, match=r"1 pictures, but a row holds 0 \(data.images_per_row\)"
    ):
        take(scene_data(scenes, "test", images_per_row=0), 1, 1)


def test_pictures_become_squares_as_configured(tmp_path):
    picture = np.zeros((30, 60, 3), np.uint8)
    picture[:, 15:45] = 255  # the middle square
    source = pictured(tmp_path, 1)
    Image.fromarray(picture).save(tmp_path / "images" / "0.png")

    def image_of(fit):
        config = text_data(source, sequence_length=32, images_per_row=1, fit=fit)
        return take(config, 1, 1)[0].images[0, 0]

    assert (image_of("crop")[:, 2:-2] == 255).all()
    stretched = image_of("stretch")
    assert (stretched[:, 16:32] == 255).all()
    assert not stretched[:, :8].any()
    padded = image_of("pad")
    assert (padded[:8] == [122, 116, 104]).all()
    assert not padded[24, :8].any()


def test_impossible_configurations_are_refused_at_once(scenes):
    for options in ({"template": "quen"}, {"images_per_row": 16}, {"fit": "bend"}, {"streams": 2}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            make(scene_data(scenes, "train", **options), 1)


@pytest.mark.slow
def test_memory_stays_flat_over_200_000_samples(tmp_path):
    """Nothing is kept of a sample once it is used, and the file is mapped, not read into memory."""
    Image.new("RGB", (48, 48), (10, 200, 30)).save(tmp_path / "picture.png")
    human = [
        {"from": "human", "value": "how many?"},
        {"from": "human", "value": "<image> how many?"},
    ]
    with (tmp_path / "chats.json").open("w") as file:
        for i in range(200_000):
            turns = [human[i % 2], {"from": "gpt", "value": "one " * (1 + i % 7)}]
            entry = {"id": f"chat-{i}", "conversations": turns}
            if i % 2:
                entry["image"] = "picture.png"
            file.write(("," if i else "[") + json.dumps(entry))
        file.write("]")
    source = SourceConfig("chat", str(tmp_path / "chats.json"), str(tmp_path))
    config = text_data(
        source,
        sequence_length=120,
        images_per_row=4,
        samples_per_row=8,
        look_ahead=16,
        streams=8,
    )
    batches = make(config, 64)
    process = psutil.Process()
    used = []  # bytes, after each 20,000 samples
    while batches.skips.total.seen < 200_000:
        next(batches)
        if len(used) <= batches.skips.total.seen // 20_000:
            used.append(process.memory_full_info().uss)
    batches.close()
    assert max(used[2:]) - used[1] < 20e6, [f"{size / 1e6:.0f} MB" for size in used]


def test_one_corrupt_picture_in_a_thousand_is_named_and_no_other_takes_its_place(tmp_path, caplog):
    records = 3000
    corrupt = {"17", "1017", "2999"}
    whole = io.BytesIO()
    Image.new("RGB", (12, 12), "red").save(whole, "png")
    turns = [{"from": "human", "value": "<image> how many?"}, {"from": "gpt", "value": "one"}]
    chats = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(records)]
    (tmp_path / "chat.json").write_text(json.dumps(chats))
    for n in range(records):
        length = 40 if str(n) in corrupt else None
        (tmp_path / f"{n}.png").write_bytes(whole.getvalue()[:length])
    source = SourceConfig("chat", str(tmp_path / "chat.json"), str(tmp_path))
    config = DataConfig(
        (source,),
        sequence_length=40,
        images_per_row=1,
        samples_per_row=1,
        template="brief",
        look_ahead=1,
        streams=1,
    )
    batches = make(config, rows=1)
    seen = numbers(itertools.islice(batches, records - len(corrupt)))
    batches.close()
    # An epoch has each good record once.
    assert sorted(seen) == sorted(set(range(records)) - {int(name) for name in corrupt})
    total = batches.skips.total
    assert total.bad == len(corrupt)
    assert total.seen >= records
    skipped = [line for line in caplog.messages if line.startswith("skipped")]
    assert {line.partition("(")[2].partition(")")[0] for line in skipped} == corrupt
