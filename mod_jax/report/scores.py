"""What a run shows when it ends."""

from rich.console import Console
from rich.table import Table


def scores(rows: list[dict]) -> list[dict[str, str]]:
    """Heading -> what stands below it, of each model measured.

    Args:
      rows: of results.json: {"model", "accuracy", "by_type", "hallucination", "existence", "parameters"} each.
    """
    percent, millions = lambda share: f"{100 * share:.1f} %", lambda count: f"{count / 1e6:,.2f} M"
    return [
        {
            "model": row["model"],
            "accuracy": percent(row["accuracy"]),
            **{kind: percent(share) for kind, share in row["by_type"].items()},
            "hallucination": percent(row["hallucination"]),
            "yes rate": percent(row["existence"]["yes_rate"]),
            "F1": percent(row["existence"]["f1"]),
            "parameters": millions(row["parameters"]["total"]),
            "activated": millions(row["parameters"]["activated"]),
        }
        for row in rows
    ]


def print_table(results: dict) -> None:
    """Prints results.json: {"recipe": str, "rows": as `scores` takes them}."""
    rows, table = scores(results["rows"]), Table(title=f"{results['recipe']}: held-out answers")
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(*row.values())
    Console(width=150).print(table)
