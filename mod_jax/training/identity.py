"""Compares the run metadata of a checkpoint with those of the present run."""

import pathlib

from flax.traverse_util import flatten_dict

from mod_jax.config import ConfigError
from mod_jax.data.sources.record import shortened

TRAINING = "training"  # key of the random id that a stage's training gets when it begins
ACCUMULATION = "accumulation"  # key of a setting that may change while a stage runs
MOST_NAMED = 8  # differences that an error names


def differences(saved: dict, now: dict) -> list[str]:
    """Returns what differs, under the keys of `now`: what is not known now is not compared.

    Args:
      saved: Run metadata of a checkpoint.
      now: The same of the present run, as far as it is known.
    """
    compared = now.keys() - {TRAINING, ACCUMULATION}
    before, after = (
        flatten_dict({key: metadata.get(key, {}) for key in compared}, sep=".")
        for metadata in (saved, now)
    )
    return [
        f"{name}: was {shortened(repr(before.get(name)))}, is {shortened(repr(after.get(name)))}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def check_same(saved: dict, now: dict, name: str, folder: pathlib.Path) -> None:
    """Checks that a checkpoint of a stage was made as the present run would make it.

    Args:
      saved: Run metadata of the checkpoint.
      now: The same of the present run, as far as it is known.
      name: Name of the stage.
      folder: Folder of the stage.
    Raises:
      ConfigError: Naming the first differences, and how the stage is trained again.
    """
    wrong = differences(saved, now)
    if wrong:
        others = len(wrong) - MOST_NAMED
        more = f"; and {others} others" if others > 0 else ""
        raise ConfigError(
            f"{folder} was made with other settings, models or data; set them back, use another "
            f"--workdir, or train this stage and those after it again with --redo={name}: "
            + "; ".join(wrong[:MOST_NAMED])
            + more
        )
