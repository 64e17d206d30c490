"""Makes any source ready for fast, sequential reading: python -m mod_jax.prepare --source=chat.json --images=images --output=data/chat

The folder that it writes is a source too: {"kind": "prepared", "path": "data/chat"}. Every record is checked and every picture decoded, once; bad ones are
left out, counted and named. The records stand in a random order, which the seed and the source decide.

The same command continues one that was stopped, by whatever it was; finished shards are kept. Beyond one machine, where --runner and what follows is Beam's:

    python -m mod_jax.prepare --source=... --images=... --output=gs://bucket/chat --beam --runner=DataflowRunner --project=...
"""

import argparse
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mod_jax.config import ConfigError, DataConfig, SourceConfig, require
from mod_jax.data.prepare import local
from mod_jax.data.prepare.plan import Plan, begin, clear, finish, make_plan, sweep, tell_skipped
from mod_jax.data.sources.kinds import Source


def run(options: argparse.Namespace, beam_options: Sequence[str] = ()) -> dict:
    """Prepares, unless all is done already.

    Args:
      options: of `parser`.
      beam_options: for Beam.
    Returns:
      The index (`data.prepared`).
    Raises:
      ConfigError: if it cannot be done, or was stopped by a fault.
    """
    require(options.workers > 0, "--workers", options.workers, "a positive number of processes")
    require(
        0 <= options.max_bad_share <= 1,
        "--max-bad-share",
        options.max_bad_share,
        "a share within 0..1",
    )
    source_config = SourceConfig(options.kind, options.source, options.images, options.split)
    plan, source = make_plan(source_config, options.output, options.shards, options.seed)
    index = begin(plan)
    if index is None:
        if options.beam:
            from mod_jax.data.prepare import beam  # an optional dependency

            beam.write_shards(plan, beam_options)
        else:
            with_bar(source, plan, options)
        index = finish(plan, options.max_bad_share)
    clear(plan)
    return index


def with_bar(source: Source, plan: Plan, options: argparse.Namespace) -> None:
    """Prepares in worker processes and shows how far it is."""
    columns = (
        TextColumn("prepare"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("records"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("prepare", total=plan.records)
        try:
            local.write_shards(
                source,
                plan,
                options.workers,
                options.max_bad_share,
                lambda done: bar.update(task, completed=done),
            )
        finally:
            sweep(plan)


def tell(index: dict, output: str) -> None:
    """Prints what a prepared folder holds and lacks."""
    written, skipped, shards = (
        index["records"],
        sum(map(len, index["skipped"].values())),
        index["shards"],
    )
    size = sum(shard["bytes"] for shard in shards)
    print(
        f"{output}: {written:,} of {written + skipped:,} records written, {skipped:,} skipped, {len(shards)} shards, {size:,} bytes"
    )
    for line in tell_skipped(index["skipped"]):
        print(f"  skipped {line}")


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    form = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(
        prog="python -m mod_jax.prepare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=form,
    )
    made.add_argument("--source", required=True, help="file, folder or name of the source")
    made.add_argument(
        "--images", default="", help="folder or archive of its pictures, where they are apart"
    )
    made.add_argument(
        "--output",
        required=True,
        help="folder to write, local or gs:// (then each shard is made in TMPDIR and copied)",
    )
    made.add_argument(
        "--kind", default="chat", help="of the source, as in a configuration (`SourceConfig.kind`)"
    )
    made.add_argument("--split", default="", help="of the source, where it has several")
    made.add_argument(
        "--shards", type=int, default=0, help="files to write; by default one for each 4096 records"
    )
    made.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes; by default one a core"
    )
    made.add_argument("--seed", type=int, default=0, help="of the order")
    made.add_argument(
        "--max-bad-share",
        type=float,
        default=DataConfig.max_bad_share,
        help="share of skipped records above which it stops",
    )
    made.add_argument(
        "--beam",
        action="store_true",
        help="run as an Apache Beam pipeline; other options go to Beam",
    )
    return made


def cli() -> None:
    """The command; an expected error is one line and exit code 1."""
    options, others = parser().parse_known_args()
    try:
        require(
            options.beam or not others,
            "command line",
            " ".join(others),
            "no more options without --beam",
            "See --help.",
        )
        tell(run(options, others), options.output)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted. Give the same command again: it continues.")


if __name__ == "__main__":
    cli()
