"""Prepares the built-in set of scenes: python -m mod_jax.data.scenes --data_dir data/scenes"""

import argparse
import contextlib
import os

from absl import logging

from mod_jax.data.scenes.builder import SPLITS, ScenesConfig, prepare


def main() -> None:
    """Prepares the set and prints its folder."""
    parser = argparse.ArgumentParser(
        prog="python -m mod_jax.data.scenes", description="Prepares the built-in set of scenes."
    )
    parser.add_argument("--data_dir", required=True, help="TFDS data folder to write into")
    for split in SPLITS:
        size = getattr(ScenesConfig, split)
        help_text = f"number of records in the split {split} (default: {size}; 0: no such split)"
        parser.add_argument(f"--{split}", type=int, default=size, help=help_text)
    options = vars(parser.parse_args())
    logging.set_verbosity(logging.ERROR)  # TFDS warns that the configuration is not a named one
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        folder = prepare(**options)  # TFDS prints sizes that it does not know; its bars stay
    print(folder)


if __name__ == "__main__":
    main()
