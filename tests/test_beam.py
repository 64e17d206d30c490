"""Preparing as an Apache Beam pipeline writes the same bytes as worker processes do.

Beam needs older packages than requirements.txt pins: run these tests with `make test-beam`.
"""

import pathlib

import pytest
from small_sources import contents, prepare_here, save_chats

pytest.importorskip("apache_beam")

from mod_jax import prepare
from mod_jax.config import ConfigError, SourceConfig
from mod_jax.data.prepare import beam
from mod_jax.data.prepare.plan import begin, make_plan
from mod_jax.data.prepare.shard import write_shard

SHARDS = 5
RUNNERS = {
    "in this process": ["--runner=BundleBasedDirectRunner"],
    "in workers": [
        "--runner=FnApiRunner",
        "--direct_running_mode=multi_processing",
        "--direct_num_workers=2",
    ],
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A source of 23 records, two of which are bad."""
    config = save_chats(tmp_path_factory.mktemp("chats"))
    for number in (1, 5):
        pathlib.Path(config.images, f"{number}.jpg").unlink()
    return config


@pytest.fixture(scope="module")
def whole(chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    prepare_here(*make_plan(chats, str(folder), SHARDS))
    return folder


def run(source: SourceConfig, output, *more: str) -> dict:
    options = [
        "--source",
        source.path,
        "--images",
        source.images,
        "--output",
        str(output),
        f"--shards={SHARDS}",
        "--max-bad-share=0.5",
        "--beam",
        *more,
    ]
    return prepare.run(*prepare.parser().parse_known_args(options))


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_pipeline_writes_the_same_bytes(runner, chats, whole, tmp_path):
    run(chats, tmp_path, *RUNNERS[runner])
    assert contents(tmp_path) == contents(whole)


def test_a_pipeline_continues_what_was_begun_without_one(chats, whole, tmp_path):
    plan, source = make_plan(chats, str(tmp_path), SHARDS)
    begin(plan)
    for shard in (1, 4):
        write_shard(source, plan, shard)
    before = {shard: (tmp_path / plan.file(shard)).stat().st_ino for shard in (1, 4)}
    run(chats, tmp_path)
    assert contents(tmp_path) == contents(whole)
    assert before == {shard: (tmp_path / plan.file(shard)).stat().st_ino for shard in (1, 4)}


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_pipeline_that_fails_is_one_line_and_takes_nothing_for_whole(runner, tmp_path):
    config = save_chats(tmp_path / "source")
    plan, _ = make_plan(config, str(tmp_path / "out"), SHARDS)
    begin(plan)
    pathlib.Path(config.path).touch()
    message = (
        r"^--beam: .*--source = .*a source that does not change during the run; it has modified"
    )
    with pytest.raises(ConfigError, match=message) as raised:
        beam.write_shards(plan, RUNNERS[runner])
    assert "\n" not in str(raised.value)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"preparing.json"}
