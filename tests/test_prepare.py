"""Preparing: what a prepared folder holds, and that only the source and the settings decide it.

A folder is completed or recognisably incomplete, whatever stops the run.
"""

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from etils.epath.testing import mock_epath
from small_sources import chat, contents, picture, prepare_here, save_chats, stored
from source_files import write_all

from mod_jax import prepare
from mod_jax.config import ConfigError, SourceConfig
from mod_jax.data.prepare.plan import Plan, begin, finish, make_plan
from mod_jax.data.prepare.shard import write_shard
from mod_jax.data.sources.kinds import open_source

SHARDS = 5


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return save_chats(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="module")
def whole(chats, tmp_path_factory):
    """A folder prepared without any disturbance."""
    folder = tmp_path_factory.mktemp("whole")
    prepare_here(*make_plan(chats, str(folder), SHARDS))
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A source of every kind."""
    return write_all(tmp_path_factory.mktemp("others"))


def options(source: SourceConfig, output, *more: str) -> list[str]:
    named = {
        "kind": source.kind,
        "source": source.path,
        "images": source.images,
        "split": source.split,
        "output": output,
    }
    return [f"--{name}={value}" for name, value in named.items()] + [f"--shards={SHARDS}", *more]


def run(source: SourceConfig, output, *more: str) -> dict:
    return prepare.run(prepare.parser().parse_args(options(source, output, *more)))


def command(source: SourceConfig, output, *more: str) -> list[str]:
    return [sys.executable, "-m", "mod_jax.prepare", *options(source, output, *more)]


def plain(number: int) -> dict:
    """A chat as it must be stored."""
    record = chat(number)
    texts = [message["value"] for message in record["conversations"]]
    images = [
        [],
        [picture(number)],
        [picture(number), picture(100 + number, "PNG")],
        [picture(number)],
    ]
    return {
        "id": f"r{number}",
        "turns": [list(turn) for turn in zip(texts[::2], texts[1::2])],
        "rejected": "",
        "images": images[number % 4],
    }


def read_plainly(source) -> list[tuple]:
    """The sorted records of a source, with the bytes of their pictures."""
    records = []
    for number in range(len(source)):
        record = source[number]
        pictures = [
            image if isinstance(image, bytes) else image.read_bytes() for image in record.images
        ]
        records.append((record.id, pictures, record.turns, record.rejected))
    return sorted(records)


# What a prepared folder holds


def test_every_record_is_there_once_with_the_pictures_own_bytes(whole):
    assert sorted(stored(whole), key=lambda record: int(record["id"][1:])) == [
        plain(number) for number in range(23)
    ]


@pytest.mark.parametrize(
    "kind", ["chat", "lines", "preference", "rlaif", "tfds", "scenes", "prepared"]
)
def test_reading_it_gives_what_its_source_gives(kind, others, tmp_path):
    prepare_here(*make_plan(others[kind], str(tmp_path), shards=2, seed=3))
    raw = open_source(others[kind])
    prepared = open_source(SourceConfig("prepared", str(tmp_path)))
    assert read_plainly(prepared) == read_plainly(raw)
    assert len(prepared) == len(raw) > 1


def test_reading_it_in_order_is_a_random_order_of_the_seed(chats, whole, tmp_path):
    orders = {}
    for shards, seed in ((1, 0), (4, 0), (4, 1)):
        folder = tmp_path / f"{shards}-{seed}"
        prepare_here(*make_plan(chats, str(folder), shards, seed))
        orders[shards, seed] = [record["id"] for record in stored(folder)]
    expected = [f"r{number}" for number in np.random.RandomState(0).permutation(23)]
    assert orders[1, 0] == orders[4, 0] == [record["id"] for record in stored(whole)] == expected
    assert sorted(orders[4, 1]) == sorted(expected)
    assert orders[4, 1] != expected


def test_the_index_tells_where_it_comes_from(chats, whole):
    assert {path.name for path in whole.iterdir()} == {
        "index.json",
        *(f"data-0000{n}-of-00005.array_record" for n in range(5)),
    }
    index = json.loads((whole / "index.json").read_text())
    assert index["records"] == 23
    assert [shard["records"] for shard in index["shards"]] == [4, 5, 4, 5, 5]
    file = "data-00001-of-00005.array_record"
    assert index["shards"][1] == {
        "file": file,
        "records": 5,
        "bytes": (whole / file).stat().st_size,
    }
    stat = os.stat(chats.path)
    assert index["source"] == {
        "kind": "chat",
        "path": chats.path,
        "images": chats.images,
        "split": "",
        "files": 1,
        "bytes": stat.st_size,
        "modified": stat.st_mtime_ns,
        "format": 1,
        "seed": 0,
        "shards": 5,
    }


def test_a_shard_holds_4096_records_unless_it_is_said(tmp_path):
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    line = json.dumps({"conversations": turns}) + "\n"
    for count, shards in ((4096, 1), (4097, 2)):
        path = tmp_path / f"{count}.jsonl"
        path.write_text(line * count)
        plan, _ = make_plan(SourceConfig("chat", str(path)), "out")
        assert plan.shards == shards


# Bad records


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A source of 23 records, five of which are bad."""
    config = save_chats(tmp_path_factory.mktemp("bad"))
    images = pathlib.Path(config.images)
    (images / "1.jpg").unlink()
    (images / "b/2.png").write_bytes(picture(102, "PNG")[:-200])
    (images / "5.jpg").write_bytes(picture(5)[:-30])
    (images / "7.jpg").write_text("<html>not found</html>")
    records = [chat(number) for number in range(23)]
    records[4]["conversations"][1]["value"] = ""
    pathlib.Path(config.path).write_text(json.dumps(records))
    return config


def test_bad_records_are_left_out_and_named_with_their_reasons(bad, tmp_path):
    index = prepare_here(*make_plan(bad, str(tmp_path), SHARDS))
    good = [f"r{number}" for number in range(23) if number not in (1, 2, 4, 5, 7)]
    assert sorted(record["id"] for record in stored(tmp_path)) == sorted(good)
    named = {reason: [name for name, _ in records] for reason, records in index["skipped"].items()}
    assert named == {
        "no such picture file": ["r1"],
        "unreadable picture": ["r2", "r5", "r7"],
        "question without an answer text": ["r4"],
    }
    assert index["skipped"]["no such picture file"] == [["r1", f"{bad.images}/1.jpg"]]
    assert all("truncated" in detail for _, detail in index["skipped"]["unreadable picture"][:2])
    assert index["records"] == 18


def test_too_many_bad_records_stop_it_and_a_larger_share_continues(bad, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"--max-bad-share = 0.1: .* found \d of 23: .*begin in another folder, or allow more",
    ) as raised:
        run(bad, tmp_path, "--workers=1", "--max-bad-share=0.1")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "index.json").exists()
    with pytest.raises(ConfigError, match="index.json, which is written last, is missing"):
        open_source(SourceConfig("prepared", str(tmp_path)))
    plan, source = make_plan(bad, str(tmp_path), SHARDS)
    prepare_here(plan, source, max_bad_share=0.22)
    assert len(stored(tmp_path)) == 18


def test_a_source_without_a_single_good_record_is_refused(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"id": "a", "conversations": []}]))
    plan, source = make_plan(SourceConfig("chat", str(path)), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="found 1 of 1: 1 no turns: a"):
        prepare_here(plan, source)


# Only the source and the settings decide the bytes


def test_one_worker_and_three_make_the_same_bytes(bad, tmp_path):
    prepare_here(*make_plan(bad, str(tmp_path / "here"), SHARDS))
    for workers in (1, 3):
        run(bad, tmp_path / f"{workers}", f"--workers={workers}", "--max-bad-share=0.5")
        assert contents(tmp_path / f"{workers}") == contents(tmp_path / "here")


@pytest.mark.parametrize("done", range(SHARDS + 1))
def test_a_run_that_was_stopped_after_any_shard_is_continued(done, chats, whole, tmp_path):
    plan, source = make_plan(chats, str(tmp_path), SHARDS)
    begin(plan)
    finished = [SHARDS - 1 - shard for shard in range(done)]  # the last ones; order is irrelevant
    for shard in finished:
        write_shard(source, plan, shard)
    partial = tmp_path / "data-00000-of-00005.array_record-abc.partial"
    partial.mkdir()  # as a killed worker leaves it
    (partial / "data").write_text("half")
    before = {shard: (tmp_path / plan.file(shard)).stat().st_ino for shard in finished}
    prepare_here(*make_plan(chats, str(tmp_path), SHARDS))
    assert contents(tmp_path) == contents(whole)
    assert before == {shard: (tmp_path / plan.file(shard)).stat().st_ino for shard in finished}


def test_a_shard_that_is_cut_is_made_again(chats, whole, tmp_path):
    plan, source = make_plan(chats, str(tmp_path), SHARDS)
    begin(plan)
    for shard in range(SHARDS):
        write_shard(source, plan, shard)
    cut = tmp_path / plan.file(2)
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(
        ConfigError, match="all 5 shards; 1 are missing, first .*data-00002-of-00005"
    ):
        finish(plan, 1.0)
    run(chats, tmp_path, "--workers=1")
    assert contents(tmp_path) == contents(whole)


def test_a_whole_folder_is_left_as_it_is(chats, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert run(chats, whole, "--workers=1") == json.loads((whole / "index.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in whole.iterdir()}


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    "change, difference",
    [
        ("seed", "seed 0 instead of 1"),
        ("shards", "shards 5 instead of 4"),
        ("touch", "modified .* instead of"),
        ("kind", "kind 'chat' instead of 'preference'"),
    ],
)
def test_a_folder_of_other_settings_is_refused_with_what_differs(
    change, difference, is_whole, chats, tmp_path
):
    plan, source = make_plan(chats, str(tmp_path / "out"), SHARDS)
    if is_whole:
        prepare_here(plan, source)
    else:
        begin(plan)
    copy = shutil.copy2(chats.path, tmp_path / "kept")
    try:
        if change == "touch":
            pathlib.Path(chats.path).touch()
        kind = "preference" if change == "kind" else "chat"
        other, _ = make_plan(
            SourceConfig(kind, chats.path, chats.images),
            str(tmp_path / "out"),
            SHARDS - (change == "shards"),
            int(change == "seed"),
        )
        message = f"--output.*begun with the same settings; it has {difference}"
        with pytest.raises(ConfigError, match=message):
            begin(other)
    finally:
        shutil.copystat(copy, chats.path)


def test_a_folder_with_something_else_is_refused(chats, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"--output.*an empty folder.*thesis\.tex"):
        run(chats, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# Faults


@pytest.fixture
def stuck(tmp_path):
    """A source whose record 9 blocks its reader: the picture is a pipe that nobody writes to."""
    config = save_chats(tmp_path / "stuck")
    pipe = pathlib.Path(config.images, "9.jpg")
    pipe.unlink()
    os.mkfifo(pipe)
    return config


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def sigint_of_children(ignored: bool):
    """Sets the disposition and the mask of SIGINT that child processes inherit.

    Some shells and CI systems ignore it in background jobs, among them perhaps this test run.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
    how = signal.SIG_BLOCK if ignored else signal.SIG_UNBLOCK
    mask = signal.pthread_sigmask(how, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def begun(arguments: list[str], ignores_sigint: bool):
    """Runs the command, with its stderr as a pipe, in a session of its own, as in a terminal."""
    with sigint_of_children(ignores_sigint):
        process = subprocess.Popen(
            arguments, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


INTERRUPTIONS = ("ctrl-C", "ctrl-C where SIGINT was ignored")
FAULTS = ("a worker is killed", *INTERRUPTIONS, "the command is killed")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_clear_stop_that_the_same_command_continues(fault, stuck, tmp_path):
    output = tmp_path / "out"
    with begun(command(stuck, output, "--workers=2"), "ignored" in fault) as process:
        # The settings, and the reports of all shards but one.
        wait_for(lambda: len(list(output.glob("*.json"))) == SHARDS)
        workers = workers_of(psutil.Process(process.pid))
        assert len(workers) == 2
        if fault == "a worker is killed":
            workers[0].kill()
        if fault in INTERRUPTIONS:
            os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
        if fault == "the command is killed":
            process.kill()
        stderr = process.communicate(timeout=60)[1].strip().splitlines()
    wait_for(lambda: all(map(has_ended, workers)))
    if fault != "the command is killed":
        beginning = "error: interrupted."
        if fault == "a worker is killed":
            beginning = "error: --workers = 2: expected all processes to survive"
        assert process.returncode == 1
        assert stderr[-1].startswith(beginning)
        assert stderr[-1].endswith("it continues.")
        assert not any("Traceback" in line for line in stderr)
    assert not (output / "index.json").exists()
    pathlib.Path(stuck.images, "9.jpg").unlink()
    pathlib.Path(stuck.images, "9.jpg").write_bytes(picture(9))
    kept = {path: path.stat().st_ino for path in output.glob("*.array_record")}
    prepare_here(*make_plan(stuck, str(output), SHARDS))
    assert {path: path.stat().st_ino for path in kept} == kept
    assert not list(output.glob("*.partial"))
    ids = [record["id"] for record in stored(output)]
    assert sorted(ids) == sorted(f"r{number}" for number in range(23))


def test_too_many_bad_records_stop_it_before_its_end(stuck, tmp_path):
    pathlib.Path(stuck.images, "1.jpg").unlink()
    ended = subprocess.run(
        command(stuck, tmp_path / "out", "--workers=2", "--max-bad-share=0"),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(
        "error: --max-bad-share = 0.0: expected no more bad records, found 1 of 23: "
        "1 no such picture file: r1 ("
    )


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Simulates a disk that is full once a file has grown to this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1500, 30_000])
def test_a_full_disk_stops_it_and_leaves_no_half_shard(size, chats, whole, tmp_path):
    """1500 bytes fail in the temporary file, 30,000 in the shard, which has blocks of 64 KiB."""
    plan, source = make_plan(chats, str(tmp_path), SHARDS)
    begin(plan)
    write_shard(source, plan, 0)
    before = contents(tmp_path)
    with (
        files_of_at_most(size),
        pytest.raises(
            ConfigError,
            match=r"--output = .*expected a disk with room for the data "
            r"\(.*File too large.*\)\. Make room",
        ),
    ):
        write_shard(source, plan, 1)
    assert contents(tmp_path) == before
    prepare_here(plan, source)
    assert contents(tmp_path) == contents(whole)


def test_a_full_disk_is_one_line_of_the_command(chats, tmp_path):
    ended = subprocess.run(
        command(chats, tmp_path, "--workers=1"),
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (30_000, 30_000)),
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(
        f"error: --output = {str(tmp_path)!r}: expected a disk with room for the data"
    )
    assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["preparing.json"]


@pytest.mark.parametrize(
    "what, how, message",
    [
        ("images", "is gone", "data.sources.images|--images"),
        ("chat.json", "is gone", "data.sources.path|--source"),
        ("chat.json", "is another", "data.sources.path|--source"),
    ],
)
def test_a_source_that_does_not_stay_is_a_clear_stop(what, how, message, tmp_path):
    plan, source = make_plan(save_chats(tmp_path / "source"), str(tmp_path / "out"), 1)
    begin(plan)
    victim = tmp_path / "source" / what

    def strike(done: int) -> None:
        if done == 5:
            victim.rename(tmp_path / "gone")
            if how == "is another":
                victim.write_text("[]")

    with pytest.raises(ConfigError, match=message):
        write_shard(source, plan, 0, strike)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["preparing.json"]


def test_a_source_that_changed_between_two_shards_is_not_mixed(tmp_path):
    config = save_chats(tmp_path / "source")
    plan, source = make_plan(config, str(tmp_path / "out"), 2)
    begin(plan)
    write_shard(source, plan, 0)
    pathlib.Path(config.path).touch()
    with pytest.raises(
        ConfigError,
        match=r"--source = .*a source that does not change during the run; "
        r"it has modified \d+ instead of \d+\. Start again in another folder",
    ):
        write_shard(open_source(config), plan, 1)
    assert not (tmp_path / "out" / plan.file(1)).exists()


# The command


def test_the_command_prepares_and_tells_what_it_skipped(bad, tmp_path):
    ended = subprocess.run(
        command(bad, tmp_path, "--workers=2", "--max-bad-share=0.5"),
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0
    lines = ended.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path}: 18 of 23 records written, 5 skipped, 5 shards, ")
    assert lines[1].startswith("  skipped 3 unreadable picture: r2 (image file is truncated")
    assert {line.split(":")[0] for line in lines[2:]} == {
        "  skipped 1 no such picture file",
        "  skipped 1 question without an answer text",
    }
    assert "23/23 records" in ended.stderr


def test_pairs_without_their_kind_are_one_line(tmp_path, monkeypatch):
    pair = {"question": "Why?", "chosen": "So.", "rejected": "No."}
    (tmp_path / "pairs.json").write_text(json.dumps([pair] * 30))
    source = SourceConfig("chat", str(tmp_path / "pairs.json"))
    monkeypatch.setattr(sys, "argv", ["prepare", *options(source, tmp_path / "out")])
    with pytest.raises(SystemExit, match="^error: data.sources.kind = 'chat': .*--kind=preference"):
        prepare.cli()
    assert not (tmp_path / "out").exists()


def test_keys_that_are_not_used_are_said_once(tmp_path, capsys):
    records = [chat(number) | ({"score": 1} if number % 2 else {}) for number in range(0, 20, 4)]
    records += [chat(number) | {"source": "web", "score": 0.5} for number in range(20, 30, 4)]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(records))
    source = SourceConfig("chat", str(path))
    expected = f"  source {path}: keys not used: score, source (in 3 of 8 records)"
    for _ in range(2):  # the second time the folder is complete
        index = run(source, tmp_path / "out", "--workers=1")
        prepare.print_summary(index, "out")
        assert capsys.readouterr().out.splitlines()[1:] == [expected]
    path.write_text(json.dumps([chat(number) for number in range(0, 32, 4)]))
    plain_index = run(source, tmp_path / "plain", "--workers=1")
    assert "unused" not in plain_index
    assert plain_index == json.loads((tmp_path / "plain" / "index.json").read_text())


def test_the_order_of_the_records_is_made_once_a_process_and_stays_what_it_was(
    tmp_path, monkeypatch
):
    plan = Plan(SourceConfig("chat", "none"), str(tmp_path), 1000, 7, 3, {})
    random_state = np.random.RandomState
    order = random_state(3).permutation(1000)
    made = []
    monkeypatch.setattr(
        np.random, "RandomState", lambda seed: made.append(seed) or random_state(seed)
    )
    np.testing.assert_array_equal(np.concatenate([plan.numbers(s) for s in range(7)]), order)
    assert [plan.size(shard) for shard in range(7)] == [142, 143, 143, 143, 143, 143, 143]
    assert [len(plan.numbers(shard)) for shard in range(7)] == [plan.size(s) for s in range(7)]
    assert made == [3]
    assert len(pickle.dumps(plan)) < 1000 and pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--shards=24", "--shards = 24: expected a number from 1 to 23"),
        ("--shards=-1", "--shards = -1"),
        ("--seed=-1", "--seed = -1: expected a number from 0 to 2"),
        ("--workers=0", "--workers = 0: expected a positive number"),
        ("--max-bad-share=2", "--max-bad-share = 2.0: expected a share between 0 and 1"),
        ("--kind=parquet", "data.sources.kind = 'parquet': expected one of"),
        (
            "--source=/nowhere.json",
            "data.sources.path = '/nowhere.json': expected an existing JSON file",
        ),
        ("--images=/nowhere", "data.sources.images = '/nowhere'"),
        (
            "--max-bad-shares=1",
            "command line = '--max-bad-shares=1': expected only known options without --beam",
        ),
    ],
)
def test_impossible_options_are_one_line(argument, message, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare", *options(chats, tmp_path / "out"), argument])
    with pytest.raises(SystemExit) as raised:
        prepare.cli()
    assert str(raised.value).startswith(f"error: {message}")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_it_does_not_write_into_its_source(whole):
    with pytest.raises(ConfigError, match="a folder outside of the source"):
        make_plan(SourceConfig("prepared", str(whole)), str(whole / "again"))


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is installed")
def test_beam_is_asked_for_where_it_is_missing(chats, tmp_path):
    with pytest.raises(ConfigError, match=r"--beam: .*pip install mod-jax\[beam\]"):
        run(chats, tmp_path, "--beam")


def test_the_folder_may_be_in_a_bucket(chats, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with mock_epath():  # the bucket is then a local folder; array_record only reads local files
        prepare_here(*make_plan(chats, "gs://bucket/chat", SHARDS))
    assert contents(tmp_path / "gs:/bucket/chat") == contents(whole)
