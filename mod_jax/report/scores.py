"""The table of scores that a run prints when it ends."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table


def scores(rows: Sequence[Mapping]) -> list[dict[str, str]]:
    """Formats the scores of each model.

    Args:
      rows: The rows of results.json, each with the keys "model", "accuracy", "by_type",
        "hallucination", "existence" and "parameters".

    Returns:
      For each row: column heading -> text of the cell.
    """
    return [
        {
            "model": row["model"],
            "accuracy": _percent(row["accuracy"]),
            **{kind: _percent(share) for kind, share in row["by_type"].items()},
            "hallucination": _percent(row["hallucination"]),
            "yes rate": _percent(row["existence"]["yes_rate"]),
            "F1": _percent(row["existence"]["f1"]),
            "parameters": _millions(row["parameters"]["total"]),
            "activated": _millions(row["parameters"]["activated"]),
        }
        for row in rows
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def print_table(results: Mapping) -> None:
    """Prints the content of results.json: {"recipe": str, "rows": as for `scores`}."""
    rows = scores(results["rows"])
    table = Table(title=f"{results['recipe']}: held-out answers")
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(*row.values())
    Console(width=150).print(table)
