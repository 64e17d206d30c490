"""How a train step grows, one size at a time: python -m benchmarks.growth --json=OUT

From a step of the preset, only one size is changed: answer tokens (of rows twice as long),
positions of a row (with as many answer tokens), experts of which two are used, or samples of a
batch. "excess" is a step's time over the time that its size predicts: that of the first row of its
group, times the FLOPs of this row over those of the first (of attention too, which grows with the
square of the positions). Experts that no token chooses cost nothing in the layers; what they add is
the optimizer's work on their weights.
"""

import dataclasses
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks import setting as settings
from benchmarks.setting import DTYPE, JSON, PRESET, REMAT, STEPS, WARMUP
from benchmarks.sizes import PRESETS, Sizes
from benchmarks.step import WORK_FLAG, measured


def changes(sizes: Sizes) -> Iterator[tuple[str, int, Sizes]]:
    """(what is changed, to how much, the sizes), group by group."""
    text = sizes.positions - sizes.features
    for share in (1 / 6, 1 / 3, 1 / 2):
        changed = dataclasses.replace(sizes, positions=2 * sizes.positions, answer_share=share)
        yield "answer tokens", changed.answer, changed
    for factor in (1, 2, 4):
        positions = factor * sizes.positions
        share = sizes.answer_share * text / (positions - sizes.features)
        changed = dataclasses.replace(sizes, positions=positions, answer_share=share)
        yield "positions", positions, changed
    for experts in (4, 8, 16):
        yield "experts", experts, dataclasses.replace(sizes, experts=experts)
    for factor in (1, 2, 4):
        samples = factor * sizes.samples
        yield "samples", samples, dataclasses.replace(sizes, samples=samples)


def main(_) -> None:
    records: list[dict] = []
    for what, size, sizes in changes(PRESETS[PRESET.value]):
        about = {"preset": PRESET.value, "changed": what, "size": size}
        options = {"dtype": DTYPE.value, "remat": REMAT.value}
        setting = settings.of_sizes(about, sizes, WORK_FLAG.value, **options)
        found = measured(setting, WARMUP.value, STEPS.value)
        first = next((r for r in records if r["changed"] == what), None)
        record = {**setting.about, **found}
        excess = 1.0
        if first:
            grown = sum(found["flops"].values()) / sum(first["flops"].values())
            excess = found["seconds"] / first["seconds"] / grown
        records.append(record | {"excess": excess})
    table = Table(title=f"{PRESET.value}, {WORK_FLAG.value}", title_justify="left")
    for column in ("changed", "to", "GFLOP", "seconds", "excess", "planned GiB"):
        table.add_column(column, justify="left" if column == "changed" else "right")
    for r in records:
        table.add_row(
            r["changed"],
            str(r["size"]),
            f"{sum(r['flops'].values()) / 1e9:.1f}",
            f"{r['seconds']:.3f}",
            f"{r['excess']:.2f}",
            f"{r['planned_gib']:.3f}",
        )
    Console(width=100).print(table)
    measure.report(records, JSON.value)


if __name__ == "__main__":
    settings.run(main)
