"""Which share of a row's positions is empty, by way of packing and by length of the rows: python -m benchmarks.padding

On lengths as LLaVA-1.5's data have them, of which no record is needed.
"""

import grain
import numpy as np
from rich.console import Console
from rich.table import Table

from mod_jax.config import DataConfig, SourceConfig
from mod_jax.data.batches.statistics import SourceStatistics, packing

SAMPLES, PICTURE, LONGEST, ROWS = 20_000, 576, 2048, 32

# Samples (thousands, LLaVA-1.5, arXiv 2310.03744, table 7, and LLaVA's own three parts), pictures, and text: median and sigma of a log-normal, in tokens.
# Sizes are published. Medians are estimates, the template included, from what is: turns a sample (VQAv2 5, GQA 13, Visual Genome 10, RefCOCO < 10, ...) and the
# sets' bytes (llava_instruct 674 MB and 664,943 samples, llava_pretrain 94 MB and 558,128, of which these lengths make about as much).
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


def draw(parts: dict[str, tuple], seed: int = 0) -> np.ndarray:
    """Positions and pictures of SAMPLES samples, i32[samples,2]; what is longer than LONGEST is cut."""
    rng = np.random.default_rng(seed)
    counts, pictures, medians, sigmas = np.array(list(parts.values())).T
    part = rng.choice(len(parts), SAMPLES, p=counts / counts.sum())
    text = medians[part] * np.exp(sigmas[part] * rng.normal(size=SAMPLES))
    return np.stack(
        [np.minimum(LONGEST, PICTURE * pictures[part] + text), pictures[part]], 1
    ).astype(np.int32)


def ours(sizes: np.ndarray, length: int, **options) -> float:
    """Padding of the pipeline's rows."""
    source = SourceConfig(path="drawn")
    config = DataConfig(
        (source,), sequence_length=length, images_per_row=length // PICTURE, **options
    )
    return packing(config, [SourceStatistics(source, sizes, 0, 0, ())]).padding


def grains(sizes: np.ndarray, length: int, bins: int) -> float:
    """Padding of Grain's first fit into so many rows at once."""
    samples = grain.MapDataset.source(
        [{"tokens": np.ones(positions, np.int8)} for positions, _ in sizes]
    ).to_iter_dataset()
    rows = list(
        grain.experimental.FirstFitPackIterDataset(
            samples, length_struct={"tokens": length}, num_packing_bins=bins, shuffle_bins=False
        )
    )
    return 1 - sizes[:, 0].sum() / (len(rows) * length)


def to_the_longest(sizes: np.ndarray, rows: int) -> float:
    """Padding without packing: each batch as long as its longest sample."""
    batches = sizes[: len(sizes) // rows * rows, 0].reshape(-1, rows)
    return 1 - batches.sum() / (batches.max(1) * rows).sum()


def least(sizes: np.ndarray, length: int) -> float:
    """A bound that no packing of whole samples goes below (dual feasible functions: Fekete and Schepers, 2001, u(k))."""
    shares = sizes[:, 0] / length
    rows = max(
        np.where(np.isclose(shares * (k + 1) % 1, 0), shares, np.floor(shares * (k + 1)) / k).sum()
        for k in range(1, 20)
    )
    return 1 - shares.sum() / max(rows, shares.sum())


def main():
    """Prints the tables."""
    console, lengths = Console(width=140), (2048, 2304, 4096)
    for name, parts in {
        "instructions (LLaVA-1.5)": INSTRUCTIONS,
        "captions": CAPTIONS,
        "both, as the dense mimic mixes them": INSTRUCTIONS | CAPTIONS,
    }.items():
        sizes = draw(parts)
        ways = {
            f"no packing, to the longest of {ROWS}": lambda length, sizes=sizes: to_the_longest(
                sizes, ROWS
            ),
            "no packing, to the row's length": lambda length, sizes=sizes: (
                1 - sizes[:, 0].mean() / length
            ),
            **{
                f"Grain's first fit, {bins} rows at once": lambda length, sizes=sizes, bins=bins: (
                    grains(sizes, length, bins)
                )
                for bins in (8, 32)
            },
            **{
                f"ours, look_ahead {ahead}": lambda length, sizes=sizes, ahead=ahead: ours(
                    sizes, length, look_ahead=ahead
                )
                for ahead in (8, 32, 128)
            },
            "whole samples: no packing is below": lambda length, sizes=sizes: least(sizes, length),
        }
        table = Table(
            title=f"padding, {name}: {sizes[:, 0].mean():.0f} positions a sample on average",
            title_justify="left",
        )
        for column in ("", *(f"rows of {length}" for length in lengths)):
            table.add_column(column, justify="right" if column else "left")
        for way, padding in ways.items():
            table.add_row(way, *(f"{padding(length):.1%}" for length in lengths))
        console.print(table)


if __name__ == "__main__":
    main()
