"""Preparing: any source, once, as a folder of array_record shards (`data.prepared`) whose sequential reading is a random order.

The records are shuffled over the whole source, by the seed alone, and dealt to shards of equal size; pictures keep their bytes. A shard is one task that
depends on nothing but the plan (`data.shards`), so the folder's bytes are the same whoever does the tasks, wherever and in what sequence: worker processes
(`mod_jax.prepare`) or Apache Beam (`data.beam`). A finished shard has a report beside it; the index is written last and takes the reports in.
"""

import contextlib
import dataclasses
import glob
import json
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from mod_jax.config import ConfigError, SourceConfig, require
from mod_jax.data.sources.kinds import Source, open_source
from mod_jax.data.sources.prepared import FORMAT, INDEX
from mod_jax.storage.atomic import write_json

RECORDS_A_SHARD = 4096  # unless the number of shards is given; LLaVA's pictures make that 0.4 GB
BEGUN = "preparing.json"  # the settings of a folder that has no index yet
PARTIAL = ".partial"
AGAIN = "Then give the same command again: it continues."


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is prepared and where: equal plans make equal bytes.

    Attributes:
      source: where records come from.
      output: folder, local or gs://.
      records: of the source.
      shards: files to make.
      seed: of the order.
      described: the source, by `describe`.
    """

    source: SourceConfig
    output: str
    records: int
    shards: int
    seed: int
    described: dict

    @property
    def folder(self) -> epath.Path:
        """The output."""
        return epath.Path(self.output)

    @property
    def settings(self) -> dict:
        """What has to be equal for a folder to be continued."""
        return {**self.described, "format": FORMAT, "seed": self.seed, "shards": self.shards}

    def file(self, shard: int) -> str:
        """Name of a shard."""
        return f"data-{shard:05d}-of-{self.shards:05d}.array_record"

    def report(self, shard: int) -> epath.Path:
        """The file beside a finished shard: {"records", "bytes", "skipped": [[number, id, reason], ...]}."""
        return self.folder / f"{self.file(shard)}.json"

    def numbers(self, shard: int) -> np.ndarray:
        """The records of a shard, i64, in the order in which they are written."""
        order = np.random.RandomState(self.seed).permutation(
            self.records
        )  # numpy holds RandomState's numbers fixed, its Generator's not
        return order[
            shard * self.records // self.shards : (shard + 1) * self.records // self.shards
        ]


def make_plan(
    config: SourceConfig, output: str, shards: int = 0, seed: int = 0
) -> tuple[Plan, Source]:
    """Opens the source.

    Args:
      config: of the source.
      output: folder, local or gs://; not within the source.
      shards: to make; 0: one for each RECORDS_A_SHARD records.
      seed: of the order, 0..2**32 - 1.
    Raises:
      ConfigError: for a source that cannot be opened, and impossible numbers.
    """
    require(bool(output), "--output", output, "a folder")
    require(0 <= seed < 2**32, "--seed", seed, "a number within 0..2**32 - 1")
    source = open_source(config)
    inside = (
        not is_remote(output)
        and pathlib.Path(config.path).resolve() in pathlib.Path(output, "-").resolve().parents
    )
    require(not inside, "--output", output, f"a folder outside of the source {config.path!r}")
    require(
        0 <= shards <= len(source),
        "--shards",
        shards,
        f"a number within 1..{len(source)}, the records, or 0 to have it chosen",
    )
    return Plan(
        config,
        output,
        len(source),
        shards or -(-len(source) // RECORDS_A_SHARD),
        seed,
        describe(config),
    ), source


def is_remote(path: str) -> bool:
    """Whether it is a bucket's."""
    return "://" in path


def describe(config: SourceConfig) -> dict:
    """What tells a source from another, and from itself after a change: what is asked of it, and number, bytes and latest change (ns) of its files.

    Of a folder of pictures, and of a TFDS name, only the name counts.

    Raises:
      ConfigError: if the pictures are gone.
    """
    path, images = pathlib.Path(config.path), pathlib.Path(config.images)
    require(
        is_remote(config.images) or images.exists(),
        "--images",
        config.images,
        "the folder or archive that was there when the run began",
    )
    found = (
        [path]
        if path.is_file()
        else path.rglob("*")
        if path.is_dir()
        else map(pathlib.Path, glob.glob(config.path))
    )
    stats = [
        file.stat() for file in [*found, *([images] if images.is_file() else [])] if file.is_file()
    ]
    return {
        "kind": config.kind,
        "path": config.path,
        "images": config.images,
        "split": config.split,
        "files": len(stats),
        "bytes": sum(stat.st_size for stat in stats),
        "modified": max((stat.st_mtime_ns for stat in stats), default=0),
    }


def differences(found: dict, wanted: dict) -> str:
    """What is not as wanted, as text; empty if nothing is."""
    return ", ".join(
        f"{key} {found.get(key)!r} instead of {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value
    )


@contextlib.contextmanager
def writing(folder: str) -> Iterator[None]:
    """Makes failing to write an expected error."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--output = {folder!r}: expected a disk that takes the data ({error}). Make room. {AGAIN}"
        ) from None


def begin(plan: Plan) -> dict | None:
    """Claims an empty folder for the plan, or takes up one that it began.

    Returns:
      The index, if the folder is whole.
    Raises:
      ConfigError: if the folder was begun with other settings, or holds something else.
    """
    with writing(plan.output):
        plan.folder.mkdir(parents=True, exist_ok=True)
        sweep(plan)
        names = {path.name for path in _files(plan)}
        if not names:
            write_json(plan.folder / BEGUN, plan.settings)
            return None
    require(
        bool(names & {INDEX, BEGUN}),
        "--output",
        plan.output,
        f"an empty folder, or one that this command began; found {min(names)!r}",
    )
    index = json.loads((plan.folder / INDEX).read_text()) if INDEX in names else None
    wrong = differences(
        index["source"] if index else json.loads((plan.folder / BEGUN).read_text()), plan.settings
    )
    require(
        not wrong,
        "--output",
        plan.output,
        f"a folder begun with the same settings; it has {wrong}",
        "Take another folder, or remove this one.",
    )
    return index


def sweep(plan: Plan) -> None:
    """Removes what processes that were killed have left half-written."""
    for path in _files(plan):
        if path.name.endswith(PARTIAL):
            path.rmtree() if path.is_dir() else path.unlink()


def _files(plan: Plan) -> list[epath.Path]:
    return (
        list(plan.folder.iterdir()) if plan.folder.exists() else []
    )  # a bucket has no empty folders


def finished(plan: Plan) -> dict[int, dict]:
    """Shard -> report, of the shards that are whole."""
    reports = {}
    for shard in range(plan.shards):
        with contextlib.suppress(
            FileNotFoundError, json.JSONDecodeError
        ):  # a power cut may leave either file empty
            report = json.loads(plan.report(shard).read_text())
            if (plan.folder / plan.file(shard)).stat().length == report["bytes"]:
                reports[shard] = report
    return reports


def group_by_reason(reports: Iterable[dict]) -> dict[str, list[list[str]]]:
    """Reason -> [id, detail] of each record that was skipped for it, in the source's order. A detail is what follows a reason's colon."""
    groups = {}
    for _, name, reason in sorted(record for report in reports for record in report["skipped"]):
        head, _, detail = reason.partition(": ")
        groups.setdefault(head, []).append([name, detail])
    return groups


def tell_skipped(groups: dict[str, list[list[str]]], first: int = 3) -> list[str]:
    """A line for each reason, the most frequent in front: how many records, and who the first ones are."""
    some = lambda records: (
        ", ".join(f"{name} ({detail})" if detail else name for name, detail in records[:first])
        + ", ..." * (len(records) > first)
    )
    return [
        f"{len(records):,} {reason}: {some(records)}"
        for reason, records in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]


def judge(plan: Plan, reports: Iterable[dict], max_bad_share: float) -> None:
    """Stops what cannot end well any more, whatever is in the shards that are not written yet.

    Raises:
      ConfigError: if more than that share of the source's records was skipped, or every single one.
    """
    bad = sum(len(report["skipped"]) for report in reports)
    if bad > max_bad_share * plan.records or bad == plan.records:
        told = "; ".join(tell_skipped(group_by_reason(reports)))
        raise ConfigError(
            f"--max-bad-share = {max_bad_share}: expected no more bad records, found {bad:,} of {plan.records:,}: {told}. "
            "Mend the source and begin in another folder, or allow more and give the command again: it continues."
        )


def finish(plan: Plan, max_bad_share: float) -> dict:
    """Writes the index of a folder all of whose shards are finished; with it the folder is whole.

    Returns:
      The index.
    Raises:
      ConfigError: if shards are missing, too many records were skipped, or the disk is full.
    """
    reports = finished(plan)
    missing = [plan.file(shard) for shard in range(plan.shards) if shard not in reports]
    require(
        not missing,
        "--output",
        plan.output,
        f"all {plan.shards} shards; missing are {missing[:3]} of {len(missing)}",
        AGAIN,
    )
    judge(plan, reports.values(), max_bad_share)
    shards = [
        {"file": plan.file(shard), "records": report["records"], "bytes": report["bytes"]}
        for shard, report in reports.items()
    ]
    index = {
        "format": FORMAT,
        "records": sum(shard["records"] for shard in shards),
        "shards": shards,
        "skipped": group_by_reason(reports.values()),
        "source": plan.settings,
    }
    with writing(plan.output):
        write_json(plan.folder / INDEX, index)
    return index


def clear(plan: Plan) -> None:
    """Removes what the index has replaced."""
    with writing(plan.output):
        for path in (plan.folder / BEGUN, *map(plan.report, range(plan.shards))):
            path.unlink(missing_ok=True)
