"""Share of row positions that are padding, by packing method and row length.

    python -m benchmarks.padding

The sample lengths are drawn from the distributions of LLaVA-1.5's data, so no record is needed.
"""

from collections.abc import Callable
from functools import partial

import grain
import numpy as np
from rich.console import Console
from rich.table import Table

from mod_jax.config import DataConfig, SourceConfig
from mod_jax.data.batches.statistics import SourceStatistics, packing
from mod_jax.data.sources.unused_keys import UnusedKeys

SAMPLES = 20_000
PICTURE = 576  # positions of a picture
LONGEST = 2048  # positions; longer samples are cut
ROWS = 32  # rows of an unpacked batch
LENGTHS = (2048, 2304, 4096)  # positions of a row

# Name -> (thousands of samples, pictures per sample, median and sigma of a log-normal distribution
# of the text's length in tokens). The numbers of samples are published (LLaVA-1.5, arXiv
# 2310.03744, table 7, and LLaVA's own three parts). The medians, which include the template, are
# estimates from what is published: the turns per sample (VQAv2 5, GQA 13, Visual Genome 10, RefCOCO
# < 10, ...) and the sizes of the files (llava_instruct: 674 MB for 664,943 samples; llava_pretrain:
# 94 MB for 558,128), which these lengths add up to approximately.
INSTRUCTIONS = {
    "LLaVA conversation": (58, 1, 390, 0.35),
    "LLaVA detail": (23, 1, 190, 0.30),
    "LLaVA reasoning": (77, 1, 230, 0.30),
    "ShareGPT": (40, 0, 550, 0.90),
    "VQAv2": (83, 1, 154, 0.20),
    "GQA": (72, 1, 332, 0.40),
    "OKVQA": (9, 1, 65, 0.15),
    "OCRVQA": (80, 1, 165, 0.25),
    "A-OKVQA": (66, 1, 95, 0.20),
    "TextCaps": (22, 1, 130, 0.30),
    "RefCOCO": (48, 1, 435, 0.40),
    "Visual Genome": (86, 1, 530, 0.10),
}
CAPTIONS = {"BLIP captions": (558, 1, 65, 0.20)}
MIXTURES = {
    "instructions (LLaVA-1.5)": INSTRUCTIONS,
    "captions": CAPTIONS,
    "both, as the dense mimic mixes them": INSTRUCTIONS | CAPTIONS,
}


def draw(parts: dict[str, tuple], seed: int = 0) -> np.ndarray:
    """Draws positions and pictures of SAMPLES samples, i32[samples,2]."""
    rng = np.random.default_rng(seed)
    counts, pictures, medians, sigmas = np.array(list(parts.values())).T
    part = rng.choice(len(parts), SAMPLES, p=counts / counts.sum())
    text = medians[part] * np.exp(sigmas[part] * rng.normal(size=SAMPLES))
    positions = np.minimum(LONGEST, PICTURE * pictures[part] + text)
    return np.stack([positions, pictures[part]], 1).astype(np.int32)


def padding_of_pipeline(
    sizes: np.ndarray, length: int, look_ahead: int = 32, samples: int = 16
) -> float:
    """Padding of this project's input pipeline, with at most `samples` in a row."""
    source = SourceConfig(path="drawn")
    config = DataConfig(
        (source,),
        sequence_length=length,
        images_per_row=min(samples, length // PICTURE),
        samples_per_row=samples,
        look_ahead=look_ahead,
    )
    statistics = SourceStatistics(
        source, sizes, answers=0, truncated=0, skipped=(), unused=UnusedKeys()
    )
    return packing(config, [statistics]).padding


def padding_of_grain(sizes: np.ndarray, length: int, bins: int) -> float:
    """Padding of Grain's first-fit packing into `bins` open rows."""
    samples = grain.MapDataset.source(
        [{"tokens": np.ones(positions, np.int8)} for positions, _ in sizes]
    ).to_iter_dataset()
    rows = list(
        grain.experimental.FirstFitPackIterDataset(
            samples, length_struct={"tokens": length}, num_packing_bins=bins, shuffle_bins=False
        )
    )
    return 1 - sizes[:, 0].sum() / (len(rows) * length)


def padding_of_batches(sizes: np.ndarray, length: int) -> float:
    """Padding without packing, each batch of ROWS samples as long as its longest sample."""
    batches = sizes[: len(sizes) // ROWS * ROWS, 0].reshape(-1, ROWS)
    return 1 - batches.sum() / (batches.max(1) * ROWS).sum()


def padding_of_single_samples(sizes: np.ndarray, length: int) -> float:
    """Padding without packing, each sample in a row of `length` positions."""
    return 1 - sizes[:, 0].mean() / length


def lower_bound(sizes: np.ndarray, length: int) -> float:
    """Padding that no packing of whole samples can go below.

    From dual feasible functions (Fekete and Schepers, 2001: u(k)), which bound the number of rows.
    """
    shares = sizes[:, 0] / length
    rows = []
    for k in range(1, 20):
        scaled = shares * (k + 1)
        is_whole = np.isclose(scaled % 1, 0)
        rows.append(np.where(is_whole, shares, np.floor(scaled) / k).sum())
    return 1 - shares.sum() / max(*rows, shares.sum())


def methods(sizes: np.ndarray) -> dict[str, Callable[[int], float]]:
    """Title of a packing method -> its padding as a function of the row length."""
    return {
        f"no packing, to the longest of {ROWS}": partial(padding_of_batches, sizes),
        "no packing, to the row's length": partial(padding_of_single_samples, sizes),
        "Grain's first fit, 8 open rows": partial(padding_of_grain, sizes, bins=8),
        "Grain's first fit, 32 open rows": partial(padding_of_grain, sizes, bins=32),
        "ours, look_ahead 8": partial(padding_of_pipeline, sizes, look_ahead=8),
        "ours, look_ahead 32": partial(padding_of_pipeline, sizes, look_ahead=32),
        "ours, look_ahead 128": partial(padding_of_pipeline, sizes, look_ahead=128),
        "ours, two samples in a row": partial(padding_of_pipeline, sizes, samples=2),
        "lower bound for whole samples": partial(lower_bound, sizes),
    }


def main() -> None:
    """Prints a table for each mixture."""
    console = Console(width=140)
    for name, parts in MIXTURES.items():
        sizes = draw(parts)
        title = f"padding, {name}: {sizes[:, 0].mean():.0f} positions per sample on average"
        table = Table(title=title, title_justify="left")
        for column in ("", *(f"rows of {length}" for length in LENGTHS)):
            table.add_column(column, justify="right" if column else "left")
        for method, padding in methods(sizes).items():
            table.add_row(method, *(f"{padding(length):.1%}" for length in LENGTHS))
        console.print(table)


if __name__ == "__main__":
    main()
