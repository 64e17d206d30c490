"""Small random students of ours, exported, and what we compute with them, for check.py: python -m stock.write FOLDER, with tests/ on the path."""

import pathlib
import shutil
import sys

import families


def main() -> None:
    """Writes them all; what was in the folder is lost."""
    target = pathlib.Path(sys.argv[1]).absolute()
    shutil.rmtree(target, ignore_errors=True)
    for name in families.STUDENTS:
        (target / name).mkdir(parents=True)
        families.write_export(name, target / name)
        print(f"written: {target / name}", flush=True)


if __name__ == "__main__":
    main()
