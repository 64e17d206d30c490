"""What a run shows when it ends."""

from rich.console import Console
from rich.table import Table


def print_table(results: dict) -> None:
    """Prints the rows of results.json.

    Args:
      results: {"recipe": str, "rows": [{"model", "accuracy", "by_type", "hallucination", "existence", "parameters"}]}.
    """
    types = list(results["rows"][0]["by_type"])
    table = Table(title=f"{results['recipe']}: held-out answers")
    for heading in ["model", "accuracy", *types, "hallucination", "yes rate", "F1", "parameters", "activated"]:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    percent = lambda share: f"{100 * share:.1f} %"
    for row in results["rows"]:
        existence, parameters = row["existence"], row["parameters"]
        shares = [row["accuracy"], *row["by_type"].values(), row["hallucination"], existence["yes_rate"], existence["f1"]]
        table.add_row(row["model"], *map(percent, shares), f"{parameters['total'] / 1e6:.2f} M", f"{parameters['activated'] / 1e6:.2f} M")
    Console(width=150).print(table)
