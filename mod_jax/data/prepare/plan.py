"""Prepares any source once, as a folder of array_record shards that is fast to read in sequence.

The records are shuffled over the whole source, by the seed alone, and split into shards of equal
size. Pictures keep their bytes. A shard is one task that depends on nothing but the plan (`shard`).
The bytes of the folder are therefore the same whoever runs the tasks, wherever and in whatever
order: worker processes (`local`) or Apache Beam (`beam`). A finished shard has a report beside it.
The index, which is written last, replaces the reports.
"""

import contextlib
import dataclasses
import functools
import glob
import json
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from mod_jax.config import ConfigError, SourceConfig, require
from mod_jax.data.samples.bad_share import Read, too_many
from mod_jax.data.sources.kinds import Source, open_source
from mod_jax.data.sources.prepared import FORMAT, INDEX
from mod_jax.data.sources.unused_keys import UnusedKeys
from mod_jax.storage.atomic import write_json
from mod_jax.storage.place import is_remote

RECORDS_PER_SHARD = 4096  # by default; 0.4 GB with LLaVA's pictures
SETTINGS = "preparing.json"  # holds the settings of a folder that has no index yet
PARTIAL = ".partial"
AGAIN = "Run the same command again: it continues."


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to prepare and where. Equal plans make equal bytes.

    Attributes:
      source: Where the records come from.
      output: Folder, local or gs://.
      records: Number of records of the source.
      shards: Number of files to write.
      seed: Seed of the order of the records.
      described: The source as `describe` returns it.
    """

    source: SourceConfig
    output: str
    records: int
    shards: int
    seed: int
    described: dict

    @property
    def folder(self) -> epath.Path:
        """The output folder."""
        return epath.Path(self.output)

    @property
    def settings(self) -> dict:
        """The settings that must be equal for a folder to be continued."""
        return {**self.described, "format": FORMAT, "seed": self.seed, "shards": self.shards}

    def file(self, shard: int) -> str:
        """Returns the file name of a shard."""
        return f"data-{shard:05d}-of-{self.shards:05d}.array_record"

    def report(self, shard: int) -> epath.Path:
        """Returns the path of the report beside a finished shard.

        A report is {"records", "bytes", "skipped": [[number, id, reason], ...], "unused": what
        `UnusedKeys` holds, as a dict}.
        """
        return self.folder / f"{self.file(shard)}.json"

    def numbers(self, shard: int) -> np.ndarray:
        """Returns the records of a shard, i64, in the order in which they are written."""
        return self._order[slice(*self._range(shard))]

    def size(self, shard: int) -> int:
        """Returns the number of records of a shard."""
        start, end = self._range(shard)
        return end - start

    def _range(self, shard: int) -> tuple[int, int]:
        return shard * self.records // self.shards, (shard + 1) * self.records // self.shards

    @functools.cached_property
    def _order(self) -> np.ndarray:
        # NumPy guarantees that RandomState's numbers never change; those of its Generator may.
        return np.random.RandomState(self.seed).permutation(self.records)

    def __getstate__(self) -> dict:
        # The order may be long; each process makes its own.
        return {name: value for name, value in self.__dict__.items() if name != "_order"}


def make_plan(
    config: SourceConfig, output: str, shards: int = 0, seed: int = 0
) -> tuple[Plan, Source]:
    """Opens a source and plans how it is prepared.

    Args:
      config: The source.
      output: Folder, local or gs://, outside of the source.
      shards: Number of shards; 0: one per RECORDS_PER_SHARD records.
      seed: Seed of the order of the records, 0..2**32 - 1.
    Returns:
      The plan, and the open source.
    Raises:
      ConfigError: If the source cannot be opened, or an argument is out of range.
    """
    require(bool(output), "--output", output, "a folder")
    require(0 <= seed < 2**32, "--seed", seed, "a number from 0 to 2**32 - 1")
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
        f"a number from 1 to {len(source)}, the number of records, or 0 for the default",
    )
    shards = shards or -(-len(source) // RECORDS_PER_SHARD)  # rounded up
    return Plan(config, output, len(source), shards, seed, describe(config)), source


def describe(config: SourceConfig) -> dict:
    """Describes a source, so that another source, or the same one after a change, is recognised.

    Returns:
      Its configuration, and the number, bytes and latest modification time (ns) of its files. Of a
      folder of pictures, and of the name of a TFDS data set, only the name is compared.
    Raises:
      ConfigError: If the pictures were removed.
    """
    path = pathlib.Path(config.path)
    images = pathlib.Path(config.images)
    require(
        is_remote(config.images) or images.exists(),
        "--images",
        config.images,
        "the folder or archive that existed when the run began",
    )
    files: Iterable[pathlib.Path]
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = path.rglob("*")
    else:
        files = map(pathlib.Path, glob.glob(config.path))
    archives = [images] if images.is_file() else []
    stats = [file.stat() for file in [*files, *archives] if file.is_file()]
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
    """Describes the values that are not as wanted; empty if there are none."""
    return ", ".join(
        f"{key} {found.get(key)!r} instead of {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value
    )


@contextlib.contextmanager
def writing(folder: str) -> Iterator[None]:
    """Turns a failure to write, such as a full disk, into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--output = {folder!r}: expected a disk with room for the data ({error}). "
            f"Make room. {AGAIN}"
        ) from None


def begin(plan: Plan) -> dict | None:
    """Claims an empty folder for the plan, or takes up one that the same plan began.

    Returns:
      The index if the folder is complete, otherwise None.
    Raises:
      ConfigError: If the folder was begun with other settings, or holds something else.
    """
    with writing(plan.output):
        plan.folder.mkdir(parents=True, exist_ok=True)
        sweep(plan)
        names = {path.name for path in _files(plan)}
        if not names:
            write_json(plan.folder / SETTINGS, plan.settings)
            return None
    require(
        bool(names & {INDEX, SETTINGS}),
        "--output",
        plan.output,
        f"an empty folder, or one that this command began; found {min(names)!r}",
    )
    index = None
    if INDEX in names:
        index = json.loads((plan.folder / INDEX).read_text())
        settings = index["source"]
    else:
        settings = json.loads((plan.folder / SETTINGS).read_text())
    wrong = differences(settings, plan.settings)
    require(
        not wrong,
        "--output",
        plan.output,
        f"a folder begun with the same settings; it has {wrong}",
        "Choose another folder, or remove this one.",
    )
    return index


def sweep(plan: Plan) -> None:
    """Removes the partial files and folders that killed processes have left."""
    for path in _files(plan):
        if not path.name.endswith(PARTIAL):
            continue
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink()


def _files(plan: Plan) -> list[epath.Path]:
    # A bucket has no empty folders: there the folder does not exist before its first file.
    return list(plan.folder.iterdir()) if plan.folder.exists() else []


def finished(plan: Plan) -> dict[int, dict]:
    """Returns shard -> report for all complete shards."""
    reports = {}
    for shard in range(plan.shards):
        # Either file may be missing, or be empty after a power cut.
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            report = json.loads(plan.report(shard).read_text())
            if (plan.folder / plan.file(shard)).stat().length == report["bytes"]:
                reports[shard] = report
    return reports


def group_by_reason(reports: Iterable[dict]) -> dict[str, list[list[str]]]:
    """Groups the skipped records of all reports.

    Returns:
      Reason -> [id, detail] of each record that was skipped for it, in the order of the source. The
      text after the first ": " of a reason is its detail.
    """
    groups: dict[str, list[list[str]]] = {}
    for _, name, reason in sorted(record for report in reports for record in report["skipped"]):
        head, _, detail = reason.partition(": ")
        groups.setdefault(head, []).append([name, detail])
    return groups


def count_unused(reports: Iterable[dict]) -> UnusedKeys:
    """Adds up the keys that training does not use, over the reports, or an index."""
    total = UnusedKeys()
    for report in reports:
        # Reports and indices made by older versions do not have them.
        of_shard = UnusedKeys(**report.get("unused", {}))
        total.add(of_shard.keys, of_shard.records)
    return total


def tell_unused(index: dict) -> str:
    """Returns a line about the keys that training does not use; "" if there are none."""
    return count_unused([index]).line(index["source"]["path"], index["records"])


def tell_skipped(groups: dict[str, list[list[str]]], first: int = 3) -> list[str]:
    """Returns a line per reason, most frequent first: the number of records and the first names."""
    lines = []
    for reason, records in sorted(groups.items(), key=lambda group: -len(group[1])):
        names = [f"{name} ({detail})" if detail else name for name, detail in records[:first]]
        if len(records) > first:
            names.append("...")
        lines.append(f"{len(records):,} {reason}: {', '.join(names)}")
    return lines


def check_bad_share(plan: Plan, reports: Iterable[dict], max_bad_share: float) -> None:
    """Stops a run that has skipped too many records, whatever the remaining shards hold.

    A shard holds records in random order, as training reads them.

    Raises:
      ConfigError: If more than that share of the source's records is bad, or all of them.
    """
    reports = list(reports)
    bad = sum(len(report["skipped"]) for report in reports)
    seen = bad + sum(report["records"] for report in reports)
    if too_many([Read(bad, seen, plan.records)], max_bad_share):
        skipped = "; ".join(tell_skipped(group_by_reason(reports)))
        raise ConfigError(
            f"--max-bad-share = {max_bad_share}: expected no more bad records, found {bad:,} of "
            f"{plan.records:,}: {skipped}. Repair the source and begin in another folder, or allow "
            "more and run the command again: it continues."
        )


def finish(plan: Plan, max_bad_share: float) -> dict:
    """Writes the index of a folder whose shards are all finished, which completes the folder.

    Returns:
      The index.
    Raises:
      ConfigError: If shards are missing, too many records were skipped, or the disk is full.
    """
    reports = finished(plan)
    missing = [plan.file(shard) for shard in range(plan.shards) if shard not in reports]
    require(
        not missing,
        "--output",
        plan.output,
        f"all {plan.shards} shards; {len(missing)} are missing, first {missing[:3]}",
        AGAIN,
    )
    check_bad_share(plan, reports.values(), max_bad_share)
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
    unused = count_unused(reports.values())
    if unused.keys:
        index["unused"] = dataclasses.asdict(unused)
    with writing(plan.output):
        write_json(plan.folder / INDEX, index)
    return index


def clear(plan: Plan) -> None:
    """Removes the settings and the reports, which the index has replaced."""
    with writing(plan.output):
        for path in (plan.folder / SETTINGS, *map(plan.report, range(plan.shards))):
            path.unlink(missing_ok=True)
