"""The table of docs/rehearsal.md: python -m benchmarks.rehearsals --on=v5e-64,v5p-128

It rehearses the published recipes (`mod_jax.rehearse`) on slices and hosts that are not here, one
after the other, and keeps what each says in a file of --folder; a file that exists is not made
again. The table is that of all files there, so the compilers for TPUs and for GPUs, which have
environments of their own, can take turns. --growth does the same for one stage at a constant number
of rows a chip.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from absl import app, flags

FOLDER = flags.DEFINE_string("folder", "runs/rehearsals", "Where the figures are kept.")
ON = flags.DEFINE_list("on", [], "Topologies, of those in MESHES; none prints the table alone.")
SIZES = flags.DEFINE_list("sizes", ["qwen2-0.5b", "qwen1.5-1.8b"], "Students.")
GROWTH = flags.DEFINE_bool("growth", False, "Rehearse the stages of GROWING, and print its table.")
QUICK = flags.DEFINE_bool("quick", False, "Compile for TPUs in a third of the time.")

# Devices along data, fsdp, expert and tensor. The later stages have 128 rows, so 256 chips need two
# along tensor.
MESHES = {
    "v5e-64": "1,16,4,1",
    "v5e-256": "1,32,4,2",
    "v6e-256": "1,32,4,2",
    "v5p-128": "1,16,4,1",
    "h100-8": "1,2,4,1",
}
GROWING = {"v5e-16": "1,4,4,1", "v5e-64": "1,16,4,1", "v5e-256": "1,64,4,1"}
ROWS_OF_A_CHIP = 2
STAGE = "sparse_mimic"
GIB = 2**30


def rehearse(folder: pathlib.Path, size: str, on: str, mesh: str, *more: str) -> None:
    """Keeps what a rehearsal says in a file, unless it is there."""
    output = folder / f"{size} {on} {mesh}.json"
    if output.exists():
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mod_jax.rehearse", f"--config=configs/llava_mod.py:{size}"]
    command += [f"--topology={on}", f"--mesh={mesh}", f"--output={output}", *more]
    command += ["--quick"] if QUICK.value else []
    print(*command[1:], flush=True)
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    print((run.stdout or run.stderr).splitlines()[-1:], flush=True)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def recipes(found: list[dict]) -> list[str]:
    """A line for each recipe and topology."""
    head = (
        "recipe",
        "slice or host, mesh",
        "GiB a chip of usable, by stage",
        "seconds a step at best, what binds",
        "without overlap",
        "GiB sent a chip",
        "chip-hours at best, without overlap",
    )
    lines = [_row(head), "|---" * len(head) + "|"]
    for one in found:
        stages = one["stages"]
        times = [stage["time"] for stage in stages if stage.get("time")]
        usable = stages[0]["memory"]["usable"] / GIB
        needed = " / ".join(f"{stage['memory']['needed'] / GIB:.1f}" for stage in stages)
        best = " / ".join(f"{time['step']:.2f} {time['binds']}" for time in times)
        apart = " / ".join(f"{time['step_without_overlap']:.2f}" for time in times)
        sent = " / ".join(
            f"{sum(s['sent']['axes'].values()) / GIB:.1f}" for s in stages if s["sent"]
        )
        hours = [one["total"][key] for key in ("chip_hours", "chip_hours_without_overlap")]
        mesh = ",".join(map(str, one["mesh"].values()))
        cells = [
            one["recipe"],
            f"{one['topology']}, {mesh}",
            f"{needed} of {usable:.2f}" + ("" if one["fits"] else ": does not fit"),
            best,
            apart,
            sent,
            f"{hours[0]:.0f}, {hours[1]:.0f}",
        ]
        lines.append(_row(cells))
    return lines


def growth(found: list[dict]) -> list[str]:
    """A line for each number of chips; efficiency is relative to the first one."""
    head = (
        f"recipe, {STAGE}",
        "slice, mesh",
        "rows",
        "GiB a chip",
        "GiB sent a chip",
        "seconds a step at best, without overlap",
        "efficiency",
    )
    lines = [_row(head), "|---" * len(head) + "|"]
    first: dict[str, dict] = {}
    for one in sorted(found, key=lambda one: (one["recipe"], one["devices"])):
        (stage,) = one["stages"]
        time = stage["time"]
        base = first.setdefault(one["recipe"], time)
        keys = ("step", "step_without_overlap")
        efficiency = ", ".join(f"{base[key] / time[key]:.0%}" for key in keys)
        cells = [
            one["recipe"],
            f"{one['topology']}, {','.join(map(str, one['mesh'].values()))}",
            str(stage["rows"]),
            f"{stage['memory']['needed'] / GIB:.2f}",
            f"{sum(stage['sent']['axes'].values()) / GIB:.2f}",
            ", ".join(f"{time[key]:.3f}" for key in keys),
            efficiency,
        ]
        lines.append(_row(cells))
    return lines


def main(_) -> None:
    meshes, table = (GROWING, growth) if GROWTH.value else (MESHES, recipes)
    folder = pathlib.Path(FOLDER.value) / ("growth" if GROWTH.value else "recipes")
    for size in SIZES.value:
        for on in ON.value:
            chips = int(on.rpartition("-")[2])
            more = [f"--stage={STAGE}", f"--rows={ROWS_OF_A_CHIP * chips}"] if GROWTH.value else []
            rehearse(folder, size, on, meshes[on], *more)
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    print("\n".join(table(found)))


if __name__ == "__main__":
    app.run(main)
