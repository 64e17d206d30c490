"""What a rehearsal prints, and saves as JSON.

All figures are those of one device, but for the verdict, chip-hours and tokens a second. A chip of
tpu7x has two devices, every other chip one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from mod_jax.rehearsal.hardware import GIB, Hardware
from mod_jax.rehearsal.stage import Rehearsed
from mod_jax.sharding import AXES

ROWS = 12  # modules of a table; the others are one row together
HOUR, DAY = 3600, 86400


def stage_report(
    name: str, found: Rehearsed, hardware: Hardware, devices: int, price: float | None
) -> dict[str, Any]:
    """The figures of a stage, in JSON types.

    Args:
      name: Name of the stage.
      found: From `stage.rehearse`.
      hardware: What a device can do.
      devices: Number of devices.
      price: USD of an hour of a chip; None leaves the cost out.
    """
    memory, stage = found.memory, found.plan.stage
    report: dict[str, Any] = {
        "stage": name,
        "rows": stage.rows,
        "accumulation": stage.accumulation,
        "remat": found.plan.student.remat,
        "fits": memory.needed <= hardware.memory,
        "memory": {
            "needed": memory.needed,
            "usable": hardware.memory,
            "parts": dict(memory.parts),
            "largest": [buffer._asdict() for buffer in memory.largest],
        },
        "compile_seconds": found.seconds,
    }
    if found.costs is None or found.roofline is None:
        return report
    roof, costs = found.roofline, found.costs
    chips = devices // hardware.devices_a_chip
    time: dict[str, Any] = {
        "seconds": dataclasses.asdict(roof),
        "step": roof.step,
        "binds": roof.binds,
        "step_without_overlap": roof.no_overlap,
        "tokens_a_second": found.positions / roof.step,
        "days": stage.steps * roof.step / DAY,
        "chip_hours": stage.steps * roof.step / HOUR * chips,
        "chip_hours_without_overlap": stage.steps * roof.no_overlap / HOUR * chips,
    }
    if price is not None:
        time["cost"] = time["chip_hours"] * price
    return report | {
        "flops": {**costs.flops, "attention kernels": found.attention},
        "bytes": dict(costs.memory),
        "sent": {by: costs.sent(by) for by in ("axes", "module", "kind")},
        "time": time,
    }


def verdict(stages: Sequence[Mapping[str, Any]], hardware: Hardware) -> tuple[bool, str]:
    """Whether all stages fit, and the line that says so, about the largest."""
    needed = max(stage["memory"]["needed"] for stage in stages)
    fits = all(stage["fits"] for stage in stages)
    a_chip = [size * hardware.devices_a_chip / GIB for size in (needed, hardware.memory)]
    words = "fits" if fits else "does not fit"
    return fits, f"{words}: {a_chip[0]:.2f} of {a_chip[1]:.2f} GiB a chip"


def totals(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Days, chip-hours and cost of all stages; empty if the compiler refused one."""
    if not all("time" in stage for stage in stages):
        return {}
    keys = ("days", "chip_hours", "chip_hours_without_overlap", "cost")
    return {
        key: sum(stage["time"][key] for stage in stages) for key in keys if key in stages[0]["time"]
    }


def print_summary(console: Console, stages: Sequence[Mapping[str, Any]]) -> None:
    """Prints a line for each stage, and their sum."""
    headings = ("stage", ">GiB", "fits", ">step ms", "binds", ">days", ">chip-hours", ">USD")
    table = _table(console, "all stages, at best", *headings)
    for stage in stages:
        needed = f"{stage['memory']['needed'] / GIB:.2f}"
        cells = [stage["stage"], needed, "yes" if stage["fits"] else "no"]
        if "time" in stage:
            time = stage["time"]
            cells += [f"{time['step'] * 1e3:.1f}", time["binds"], *_sums(time)]
        table.add_row(*cells)
    if total := totals(stages):
        table.add_row("", "", "", "", "", *_sums(total))
    console.print(table)


def _sums(time: Mapping[str, Any]) -> list[str]:
    cost = f"{time['cost']:,.0f}" if "cost" in time else ""
    return [f"{time['days']:.2f}", f"{time['chip_hours']:,.1f}", cost]


def print_stage(console: Console, report: Mapping[str, Any], mesh: Mapping[str, int]) -> None:
    """Prints the report of a stage."""
    console.rule(f"stage {report['stage']}")
    sizes = ", ".join(f"{axis} {mesh[axis]}" for axis in AXES)
    line = f"mesh {sizes}; {report['rows']} rows in {report['accumulation']} micro-batches, "
    console.print(f"{line}remat {report['remat']}", highlight=False)
    _print_memory(console, report["memory"])
    if "time" in report:
        _print_time(console, report)
        _print_modules(console, report)
        _print_axes(console, report["sent"])


def _table(console: Console, title: str, *headings: str) -> Table:
    """Prints a title and makes a table; columns whose heading begins with > are numbers."""
    console.print(f"\n{title}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading.startswith(">") else "left"
        table.add_column(heading.removeprefix(">"), justify=justify)
    return table


def _print_memory(console: Console, memory: Mapping[str, Any]) -> None:
    left = (memory["usable"] - memory["needed"]) / GIB
    words = f"{left:.2f} GiB left" if left >= 0 else f"{-left:.2f} GiB too much"
    table = _table(console, f"memory of a device: {words}", "part", ">GiB")
    for part, size in memory["parts"].items():
        table.add_row(part, f"{max(0, size) / GIB:.2f}")
    table.add_row("needed", f"{memory['needed'] / GIB:.2f}")
    table.add_row("usable", f"{memory['usable'] / GIB:.2f}")
    console.print(table)
    if not memory["largest"]:
        return  # a compiler may refuse a step without naming them
    largest = _table(console, "largest arrays of the step", "array", ">GiB", "of")
    for buffer in memory["largest"]:
        largest.add_row(buffer["shape"], f"{buffer['size'] / GIB:.2f}", buffer["place"])
    console.print(largest)


def _print_time(console: Console, report: Mapping[str, Any]) -> None:
    time = report["time"]
    table = _table(console, "a step at best, by what takes time", "", ">work", ">ms")
    work = {
        "compute": f"{sum(report['flops'].values()) / 1e12:.2f} TFLOP",
        "memory": f"{sum(report['bytes'].values()) / GIB:.1f} GiB",
        "links": f"{sum(report['sent']['axes'].values()) / GIB:.2f} GiB",
        "network": "",
    }
    for name, seconds in time["seconds"].items():
        mark = " (binds)" if name == time["binds"] else ""
        table.add_row(f"{name}{mark}", work[name], f"{seconds * 1e3:.1f}")
    console.print(table)
    cost = f", {time['cost']:,.0f} USD" if "cost" in time else ""
    console.print(
        f"step {time['step'] * 1e3:.1f} ms if all overlaps, "
        f"{time['step_without_overlap'] * 1e3:.1f} ms if nothing does; "
        f"{time['tokens_a_second']:,.0f} tokens a second; the stage: {time['days']:.2f} days, "
        f"{time['chip_hours']:,.1f} chip-hours{cost}",
        highlight=False,
    )


def _print_modules(console: Console, report: Mapping[str, Any]) -> None:
    columns = (report["flops"], report["bytes"], report["sent"]["module"])
    headings = ("module", ">TFLOP", ">GiB read and written", ">GiB sent")
    table = _table(console, "by module", *headings)
    units = (1e12, GIB, GIB)

    def shares(module: str) -> list[float]:
        totals = [sum(column.values()) or 1 for column in columns]
        return [column.get(module, 0) / total for column, total in zip(columns, totals)]

    modules = sorted(set().union(*columns), key=lambda module: -max(shares(module)))
    for module in modules[:ROWS]:
        cells = [f"{column.get(module, 0) / u:.2f}" for column, u in zip(columns, units)]
        table.add_row(module, *cells)
    rest = [
        f"{sum(column.get(module, 0) for module in modules[ROWS:]) / unit:.2f}"
        for column, unit in zip(columns, units)
    ]
    if modules[ROWS:]:
        table.add_row(f"{len(modules) - ROWS} others", *rest)
    console.print(table)


def _print_axes(console: Console, sent: Mapping[str, Mapping[str, float]]) -> None:
    table = _table(console, "sent by a device", "over", ">GiB", "as", ">GiB")
    axes, kinds = list(sent["axes"].items()), list(sent["kind"].items())
    for number in range(max(len(axes), len(kinds))):
        cells = []
        for rows in (axes, kinds):
            name, size = rows[number] if number < len(rows) else ("", None)
            cells += [name, "" if size is None else f"{size / GIB:.2f}"]
        table.add_row(*cells)
    console.print(table)
