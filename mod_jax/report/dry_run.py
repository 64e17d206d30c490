"""python -m mod_jax.train --config=... --dry-run: reads all data of the stages once, writes nothing, and says what they are.

Every sample that training would skip is named, with the reason. No weights are read; pictures are decoded unless --nodecode is said.
"""

import dataclasses
import math
import sys

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from mod_jax.config import (
    DataConfig,
    ModelConfig,
    ModelSource,
    RecipeConfig,
    SourceConfig,
    StageConfig,
)
from mod_jax.data.batches.statistics import SourceStatistics, packing, survey
from mod_jax.data.samples.sample import Skipped
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.interop import loading
from mod_jax.recipe import check_tokenizer

BARS, BAR_WIDTH = 16, 40  # of the histogram
LONGER = 9 / 8, 5 / 4, 3 / 2, 2  # rows whose padding is told too
FILE_WIDTH = 200  # columns, where the output is no terminal


def run(config: RecipeConfig, stages: tuple[str, ...], decode: bool = True) -> bool:
    """Prints the statistics of the stages' data.

    Args:
      config: of the recipe.
      stages: names.
      decode: whether pictures are decoded.
    Returns:
      Whether training would read them: no stage has more bad records than its `data.max_bad_share`.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    model, done, ok = _model_config(config.student, tokenizer), {}, True
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    for name in stages:
        stage = config.stages[name]
        console.rule(f"stage {name}")
        if stage.data not in done:  # stages may read the same data
            done[stage.data] = _survey(stage, tokenizer, model, decode, console)
        ok = tell(console, stage, done[stage.data]) and ok
    return ok


def _model_config(source: ModelSource, tokenizer) -> ModelConfig:
    """Sizes and ids of the model that a configuration names."""
    if source.random:
        config, origin = source.random, "random weights"
    else:
        with loading.open_source(source, tokenizer) as pretrained:
            config, origin = pretrained.config, pretrained.origin
    check_tokenizer(config, origin, tokenizer)
    return config


def _survey(
    stage: StageConfig, tokenizer, model: ModelConfig, decode: bool, console: Console
) -> list[SourceStatistics]:
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)
    ) as progress:
        bars = {}

        def note(source: SourceConfig, records: int, outcome) -> None:
            if source not in bars:
                bars[source] = progress.add_task(title(source), total=records)
            progress.advance(bars[source])
            if isinstance(outcome, Skipped):
                console.print(
                    f"skipped {title(source)} {outcome}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )

        return survey(stage.data, tokenizer, model, decode, note)


def title(source: SourceConfig) -> str:
    """A source's name for people."""
    return f"{source.path}:{source.split}" if source.split else source.path


def tell(console: Console, stage: StageConfig, sources: list[SourceStatistics]) -> bool:
    """Prints a stage's statistics; returns whether its share of bad records is allowed."""
    packed = packing(stage.data, sources)
    samples_a_step, weights = (
        packed.samples_a_row * stage.rows,
        sum(source.config.weight for source in sources),
    )
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
        "steps an epoch",
        f"epochs in {stage.steps:,} steps",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for source in sources:
        share = source.config.weight / weights
        steps = len(source.used) / (share * samples_a_step) if samples_a_step else float("nan")
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
            f"{stage.steps / steps:.2f}",
        )
    console.print(table)
    longer = {
        length: packing(
            dataclasses.replace(stage.data, sequence_length=length, images_per_row=pictures),
            sources,
        ).padding
        for length, pictures in _longer(stage.data)
    }
    used = np.concatenate([source.used for source in sources])
    _bars(
        console,
        "positions a sample",
        *np.histogram(used[:, 0], BARS, (0, stage.data.sequence_length)),
    )
    pictures = np.bincount(used[:, 1])
    _bars(console, "pictures a sample", pictures, np.arange(len(pictures)))
    records, skipped = (
        sum(len(source.sizes) for source in sources),
        sum(len(source.skipped) for source in sources),
    )
    ok = skipped <= stage.data.max_bad_share * records
    facts = {
        "tokens an epoch": f"{used[:, 0].sum():,}, of which {sum(source.answers for source in sources):,} are learnt",
        "rows": f"{packed.samples_a_row:.2f} samples a row, {packed.padding:.1%} of the {stage.data.sequence_length:,} positions padding",
        "padding of longer rows": ", ".join(
            f"{padding:.1%} of {length:,}" for length, padding in longer.items()
        ),
        "steps an epoch": f"{len(used) / samples_a_step:,.1f} of {stage.rows} rows"
        if samples_a_step
        else "none",
        "skipped": f"{skipped:,} of {records:,} records, {skipped / records:.2%}; data.max_bad_share = {stage.data.max_bad_share:.2%}"
        + ("" if ok else ": TOO MANY"),
    }
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", highlight=False)
    return ok


def _longer(data: DataConfig) -> list[tuple[int, int]]:
    """Lengths of rows that may suit the samples better, and their pictures."""
    return [
        (int(data.sequence_length * more), math.ceil(data.images_per_row * more)) for more in LONGER
    ]


def _bars(console: Console, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
    console.print(name)
    for count, edge in zip(counts, edges):
        console.print(
            f"{edge:8,.0f} {'█' * round(BAR_WIDTH * count / max(1, counts.max())):{BAR_WIDTH}} {count:,}",
            highlight=False,
        )
