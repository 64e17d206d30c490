"""Statistics of a recipe's data, for `python -m mod_jax.train --config=... --dry-run`.

All records of the stages are read once, and every sample that training would skip is named with
the reason. Nothing is written, and no weights are read. Pictures are decoded unless --nodecode is
given.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID
from rich.table import Table

from mod_jax.config import (
    DataConfig,
    ModelConfig,
    ModelSource,
    RecipeConfig,
    SourceConfig,
    StageConfig,
)
from mod_jax.data.batches.statistics import Measured, Packing, SourceStatistics, packing, survey
from mod_jax.data.samples.bad_share import Read, too_many
from mod_jax.data.samples.sample import Skipped
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.data.sources.kinds import title
from mod_jax.interop import loading
from mod_jax.interop.model import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BARS = 16  # bars of the histogram of lengths
BAR_WIDTH = 40  # columns of the longest bar
LONGER_ROWS = (
    9 / 8,
    5 / 4,
    3 / 2,
    2,
)  # times data.sequence_length: rows whose padding is shown too
FILE_WIDTH = 200  # columns where the output is not a terminal


def run(config: RecipeConfig, stages: Sequence[str], decode: bool = True) -> bool:
    """Prints the statistics of the stages' data.

    Args:
      config: The recipe.
      stages: Names of the stages to report on.
      decode: Whether pictures are decoded; without it, broken pictures are not found.

    Returns:
      Whether training would accept the data: in no stage are too many records skipped
      (`mod_jax.data.samples.bad_share`).

    Raises:
      ConfigError: If a source, the tokenizer or the student's folder cannot be read.
      WorkerDied: If a worker process ends early.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    model = _model_config(config.student, tokenizer)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    surveyed: dict[DataConfig, list[SourceStatistics]] = {}
    all_accepted = True
    for name in stages:
        stage = config.stages[name]
        console.rule(f"stage {name}")
        if stage.data not in surveyed:  # several stages may read the same data
            surveyed[stage.data] = _survey(stage.data, tokenizer, model, decode, console)
        accepted = _print_stage(console, stage, surveyed[stage.data])
        all_accepted = all_accepted and accepted
    return all_accepted


def _model_config(source: ModelSource, tokenizer: "PreTrainedTokenizerFast") -> ModelConfig:
    """Configuration of the model that `source` names, checked against the tokenizer."""
    if source.random:
        config, origin = source.random, "random weights"
    else:
        with loading.open_source(source, tokenizer) as pretrained:
            config, origin = pretrained.config, pretrained.origin
    check_tokenizer(config, origin, tokenizer)
    return config


def _survey(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    model: ModelConfig,
    decode: bool,
    console: Console,
) -> list[SourceStatistics]:
    """Reads all records behind progress bars and prints the skipped ones."""
    bars: dict[SourceConfig, TaskID] = {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def show(source: SourceConfig, records: int, outcome: Measured | Skipped) -> None:
            if source not in bars:
                bars[source] = progress.add_task(title(source), total=records)
            progress.advance(bars[source])
            if isinstance(outcome, Skipped):
                line = f"skipped {title(source)} {outcome}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        return survey(data, tokenizer, model, decode, show)


def _print_stage(console: Console, stage: StageConfig, sources: list[SourceStatistics]) -> bool:
    """Prints a stage's statistics; returns whether its share of skipped records is allowed."""
    packed = packing(stage.data, sources)
    console.print(_table(stage, sources, packed))
    used = np.concatenate([source.used for source in sources])
    _print_histograms(console, used, stage.data.sequence_length)
    for name, fact in _facts(stage, sources, used, packed).items():
        console.print(f"{name}: {fact}", highlight=False)
    for source in sources:
        line = source.unused.line(title(source.config), len(source.used))
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    records = sum(len(source.sizes) for source in sources)
    skipped = sum(len(source.skipped) for source in sources)
    read = [Read(len(s.skipped), len(s.sizes), len(s.sizes)) for s in sources]
    accepted = not too_many(read, stage.data.max_bad_share)
    line = (
        f"skipped: {skipped:,} of {records:,} records, {skipped / records:.2%}; "
        f"data.max_bad_share = {stage.data.max_bad_share:.2%}"
    )
    console.print(line if accepted else f"{line}: TOO MANY", highlight=False)
    return accepted


def _table(stage: StageConfig, sources: list[SourceStatistics], packed: Packing) -> Table:
    """A row for each source: its counts, its share, and how often training reads it."""
    table = Table(box=box.SIMPLE)
    table.add_column("source", overflow="fold")
    for column in (
        "records",
        "skipped",
        "truncated",
        "pictures",
        "tokens",
        "answer tokens",
        "share",
        "steps per epoch",
        f"epochs in {stage.steps:,} steps",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    samples_per_step = packed.samples_a_row * stage.rows
    total_weight = sum(source.config.weight for source in sources)
    for source in sources:
        share = source.config.weight / total_weight
        # samples_per_step is 0 if no record of the stage can be used, steps if none of this source
        steps = len(source.used) / (share * samples_per_step) if samples_per_step else math.nan
        epochs = stage.steps / steps if steps else math.nan
        counts = (
            len(source.sizes),
            len(source.skipped),
            source.truncated,
            source.sizes[:, 1].sum(),
            source.sizes[:, 0].sum(),
            source.answers,
        )
        table.add_row(
            title(source.config),
            *(f"{count:,}" for count in counts),
            f"{share:.1%}",
            f"{steps:,.1f}",
            f"{epochs:.2f}",
        )
    return table


def _print_histograms(console: Console, used: np.ndarray, sequence_length: int) -> None:
    """Prints histograms of positions and pictures; used: i32[records,2], the usable records."""
    counts, edges = np.histogram(used[:, 0], BARS, (0, sequence_length))
    _print_bars(console, "positions per sample", counts, edges)
    pictures = np.bincount(used[:, 1])
    _print_bars(console, "pictures per sample", pictures, np.arange(len(pictures)))


def _print_bars(console: Console, title: str, counts: np.ndarray, edges: np.ndarray) -> None:
    console.print(title)
    largest = counts.max(initial=1)
    for count, edge in zip(counts, edges):
        bar = "█" * round(BAR_WIDTH * count / largest)
        console.print(f"{edge:8,.0f} {bar:{BAR_WIDTH}} {count:,}", highlight=False)


def _facts(
    stage: StageConfig, sources: list[SourceStatistics], used: np.ndarray, packed: Packing
) -> dict[str, str]:
    """Name -> value of what concerns all sources; used: i32[records,2], as for the histograms."""
    answers = sum(source.answers for source in sources)
    samples_per_step = packed.samples_a_row * stage.rows
    length = stage.data.sequence_length
    steps = "none"
    if samples_per_step:
        steps = f"{len(used) / samples_per_step:,.1f} of {stage.rows} rows"
    return {
        "tokens per epoch": f"{used[:, 0].sum():,}, of which {answers:,} are answer tokens",
        "rows": f"{packed.samples_a_row:.2f} samples per row, "
        f"{packed.padding:.1%} of the {length:,} positions are padding",
        "padding of longer rows": ", ".join(
            f"{padding:.1%} of {longer:,}"
            for longer, padding in _padding_of_longer_rows(stage.data, sources).items()
        ),
        "steps per epoch": steps,
    }


def _padding_of_longer_rows(data: DataConfig, sources: list[SourceStatistics]) -> dict[int, float]:
    """Length of a row -> share of its positions that would be padding, for longer rows than now."""
    padding = {}
    for factor in LONGER_ROWS:
        length = int(data.sequence_length * factor)
        longer = dataclasses.replace(
            data, sequence_length=length, images_per_row=math.ceil(data.images_per_row * factor)
        )
        padding[length] = packing(longer, sources).padding
    return padding
