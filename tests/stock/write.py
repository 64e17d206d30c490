"""Exports small random students, with what we compute with them, for check.py:

    python -m stock.write FOLDER

tests/ has to be on the path.
"""

import pathlib
import shutil
import sys

import families


def main() -> None:
    """Writes all students; the previous contents of the folder are deleted."""
    target = pathlib.Path(sys.argv[1]).absolute()
    shutil.rmtree(target, ignore_errors=True)
    for name in families.STUDENTS:
        (target / name).mkdir(parents=True)
        families.write_export(name, target / name)
        print(f"written: {target / name}", flush=True)


if __name__ == "__main__":
    main()
