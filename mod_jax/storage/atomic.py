"""Files that are whole or not there."""

import json
import pathlib


def write_json(path: pathlib.Path, value) -> None:
    """Writes JSON through a temporary file and a rename."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
