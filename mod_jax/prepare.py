"""Prepares any source for fast sequential reading, as a folder of array_record shards.

    python -m mod_jax.prepare --source=chat.json --images=images --output=data/chat

The folder is a source too: {"kind": "prepared", "path": "data/chat"}. Every record is checked and
every picture is decoded once; bad records are left out, counted and named. The records are in a
random order that depends on the seed and the source alone.

If a run was stopped, whatever the reason, the same command continues it and keeps all finished
shards. To use more than one machine, add --beam; all other options are then passed to Beam:

    python -m mod_jax.prepare --source=... --images=... --output=gs://bucket/chat --beam \\
        --runner=DataflowRunner --project=...
"""

import argparse
import os
import signal
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
from mod_jax.data.prepare.plan import (
    AGAIN,
    Plan,
    begin,
    clear,
    finish,
    make_plan,
    sweep,
    tell_skipped,
    tell_unused,
)
from mod_jax.data.sources.kinds import Source


def run(options: argparse.Namespace, beam_options: Sequence[str] = ()) -> dict:
    """Prepares a source, unless its folder is already complete.

    Args:
      options: Parsed options of `parser`.
      beam_options: Options for Beam.
    Returns:
      The index of the prepared folder (`mod_jax.data.sources.prepared`).
    Raises:
      ConfigError: If an option is wrong, or a fault stopped the run.
    """
    require(options.workers > 0, "--workers", options.workers, "a positive number of processes")
    require(
        0 <= options.max_bad_share <= 1,
        "--max-bad-share",
        options.max_bad_share,
        "a share between 0 and 1",
    )
    source_config = SourceConfig(options.kind, options.source, options.images, options.split)
    plan, source = make_plan(source_config, options.output, options.shards, options.seed)
    index = begin(plan)
    if index is None:
        if options.beam:
            from mod_jax.data.prepare import beam  # needs the optional Apache Beam

            beam.write_shards(plan, beam_options)
        else:
            with_bar(source, plan, options)
        index = finish(plan, options.max_bad_share)
    clear(plan)
    return index


def with_bar(source: Source, plan: Plan, options: argparse.Namespace) -> None:
    """Prepares in worker processes and shows a progress bar."""
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


def print_summary(index: dict, output: str) -> None:
    """Prints what a prepared folder holds, which records were skipped, and which keys not used."""
    written = index["records"]
    skipped = sum(map(len, index["skipped"].values()))
    shards = index["shards"]
    size = sum(shard["bytes"] for shard in shards)
    print(
        f"{output}: {written:,} of {written + skipped:,} records written, {skipped:,} skipped, "
        f"{len(shards)} shards, {size:,} bytes"
    )
    for line in tell_skipped(index["skipped"]):
        print(f"  skipped {line}")
    line = tell_unused(index)
    if line:
        print(f"  {line}")


def parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m mod_jax.prepare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("--source", required=True, help="file, folder or name of the source")
    arguments.add_argument(
        "--images", default="", help="folder or archive of its pictures, if they are separate"
    )
    arguments.add_argument(
        "--output",
        required=True,
        help="folder to write, local or gs:// (each shard is then made in TMPDIR and copied)",
    )
    arguments.add_argument(
        "--kind",
        default="chat",
        help="kind of the source, as in a configuration (`SourceConfig.kind`; default: chat)",
    )
    arguments.add_argument("--split", default="", help="split of the source, if it has several")
    arguments.add_argument(
        "--shards",
        type=int,
        default=0,
        help="number of files to write (default: one per 4096 records)",
    )
    arguments.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="number of processes (default: one per core)",
    )
    arguments.add_argument("--seed", type=int, default=0, help="seed of the order (default: 0)")
    arguments.add_argument(
        "--max-bad-share",
        type=float,
        default=DataConfig.max_bad_share,
        help="stop if more than this share of the records is bad "
        f"(default: {DataConfig.max_bad_share})",
    )
    arguments.add_argument(
        "--beam",
        action="store_true",
        help="run as an Apache Beam pipeline; unknown options are passed to Beam",
    )
    return arguments


def cli() -> None:
    """Runs the command. An expected error is printed as one line, with exit code 1."""
    # A background job of a non-interactive shell inherits an ignored or blocked SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    options, others = parser().parse_known_args()
    try:
        require(
            options.beam or not others,
            "command line",
            " ".join(others),
            "only known options without --beam",
            "See --help.",
        )
        print_summary(run(options, others), options.output)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"error: interrupted. {AGAIN}")


if __name__ == "__main__":
    cli()
