"""Writes files so that a reader finds a whole file or none."""

import json
import pathlib


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes `text` to `<path>.partial`, then renames it to `path`."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: pathlib.Path, value) -> None:
    """Writes `value` as indented JSON with `write_text`."""
    write_text(path, json.dumps(value, indent=1) + "\n")
