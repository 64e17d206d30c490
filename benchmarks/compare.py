"""Compares a step with the PyTorch peer's: python -m benchmarks.compare --preset real-vocab

`make compare` sets the peer's environment up first. Both sides run by turns on one machine, each
measurement in a process of its own and under the same allocator: tcmalloc if it is found (Debian's
libtcmalloc-minimal4), as both sides make large buffers in every step. The JSON holds

  * ratios: times, the peer's over ours, and `memory_above_weights`, ours over the peer's, where
    memory is the peak during steps above what was resident before them, and of mimic and preference
    the one counts in which we compare worse;
  * seconds and gib: the medians over the rounds that the ratios are made of; and processor_seconds,
    of all 32 tokens in decoding, which other work on the machine lengthens less;
  * measurements: everything that was measured.

Both forms of the peer decode alike.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.sizes import PRESETS, WORK

ROOT = pathlib.Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".venv-peer" / "bin" / "python"
TCMALLOC = ("/usr/lib/*/libtcmalloc_minimal.so.4", "/usr/lib*/libtcmalloc_minimal.so.4")
OURS = "project"
# work -> forms of the peer
FORMS = {
    "mimic": ("authors", "rows"),
    "preference": ("authors", "rows"),
    "decode": ("rows",),
    "loss": ("rows", "compiled"),
}


def found_tcmalloc() -> pathlib.Path | None:
    for pattern in TCMALLOC:
        for path in sorted(pathlib.Path("/").glob(pattern[1:])):
            return path
    return None


def command(python: pathlib.Path, preset: str, work: str, side: str) -> list[str]:
    """The command that measures one piece of work; `side` is OURS or a form of the peer."""
    if side != OURS:
        chosen = [f"--work={work}", f"--form={side}", f"--preset={preset}"]
        return [str(python), "-m", "benchmarks.peer", *chosen]
    module = {
        "decode": ["benchmarks.decode"],
        "loss": ["benchmarks.ops", "--op=divergence"],
    }.get(work, ["benchmarks.step", f"--work={work}"])
    return [sys.executable, "-m", *module, f"--preset={preset}"]


def measured(arguments: list[str], steps: int, preload: pathlib.Path | None) -> dict:
    """What a command measures, in a process of its own."""
    environment = os.environ | ({"LD_PRELOAD": str(preload)} if preload else {})
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run(
            [*arguments, f"--steps={steps}", f"--json={file.name}"],
            check=True,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        return json.loads(pathlib.Path(file.name).read_text())


def rounds(options: argparse.Namespace, preload: pathlib.Path | None) -> Iterator[dict]:
    """All measurements; every second round goes the other way, as machines drift."""
    for number in range(options.rounds):
        for work in options.work:
            sides = (OURS, *FORMS[work])
            for side in sides[:: -1 if number % 2 else 1]:
                arguments = command(options.peer_python, options.preset, work, side)
                record = measured(arguments, options.steps, preload)
                record = record["divergence"]["step"] if (work, side) == ("loss", OURS) else record
                others = f"{record['others']:.0%} of the machine used by others"
                print(f"{work}, {side}: {record['seconds']:.4g} s, {others}", file=sys.stderr)
                yield {**record, "work": work, "side": side, "round": number}


def medians(
    records: Sequence[dict], figure: Callable[[dict], float]
) -> dict[str, dict[str, float]]:
    """Work -> side -> median of a figure over the rounds."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        sides = found.setdefault(
            record["work"], {side: [] for side in (OURS, *FORMS[record["work"]])}
        )
        sides[record["side"]].append(figure(record))
    return {
        work: {side: statistics.median(values) for side, values in sides.items()}
        for work, sides in found.items()
    }


def summary(records: Sequence[dict]) -> dict:
    """The medians and ratios of a comparison.

    Args:
      records: Measurements: `work`, `side`, and what `measure.repeat` returns. The time of decoding
        is `seconds_a_token`.

    Returns:
      seconds, processor_seconds, gib: As `medians`.
      ratios: As in the description of this module.
      contended: Whether others used the machine during any measurement.
    """
    seconds = medians(
        records, lambda r: r["seconds_a_token" if r["work"] == "decode" else "seconds"]
    )
    gib = medians(records, lambda r: r["peak_gib"])
    ratios = {
        work: {side: time / sides[OURS] for side, time in sides.items() if side != OURS}
        for work, sides in seconds.items()
    }
    if "decode" in ratios:
        ratios["decode"]["authors"] = ratios["decode"]["rows"]
    steps = [gib[work] for work in WORK if work in gib]
    if steps:
        ratios["memory_above_weights"] = {
            form: max(sides[OURS] / sides[form] for sides in steps) for form in FORMS["mimic"]
        }
    contended = any(record["contended"] for record in records)
    processor = medians(records, lambda r: r["processor_seconds"])
    found = {"ratios": ratios, "seconds": seconds, "processor_seconds": processor, "gib": gib}
    return {**found, "contended": contended}


def print_table(found: dict) -> None:
    title = f"{found['preset']}, {found['allocator']}"
    if found["contended"]:
        title += "; others used the machine, so the times are too long"
    table = Table(title=title, title_justify="left")
    for column in ("work", "side", "seconds", "processor", "GiB above", "peer's time / ours"):
        table.add_column(column, justify="left" if column in ("work", "side") else "right")
    for work, sides in found["seconds"].items():
        for side, seconds in sides.items():
            ratio = found["ratios"][work].get(side)
            figures = (
                f"{seconds:.4g}",
                f"{found['processor_seconds'][work][side]:.4g}",
                f"{found['gib'][work][side]:.3f}",
                f"{ratio:.2f}" if ratio else "",
            )
            table.add_row(work, side, *figures)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="real-vocab")
    parser.add_argument("--work", choices=FORMS, nargs="+", default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured in each round")
    parser.add_argument("--json", type=pathlib.Path, help="a file for all figures")
    parser.add_argument("--peer-python", type=pathlib.Path, default=PEER_PYTHON)
    parser.add_argument(
        "--tcmalloc", type=pathlib.Path, default=found_tcmalloc(), help="the library to preload"
    )
    options = parser.parse_args()
    if not options.peer_python.exists():
        sys.exit(
            f"error: --peer-python = '{options.peer_python}': expected the peer's environment. "
            "`make compare` sets it up."
        )
    records = list(rounds(options, options.tcmalloc))
    found = {"preset": options.preset, "allocator": records[0]["allocator"]}
    found |= {"processors": os.cpu_count(), **summary(records)}
    print_table(found)
    if options.json:
        text = json.dumps(found | {"measurements": records}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
