"""Records of array_record files by number, with the faults told apart."""

import pathlib
from collections.abc import Sequence

from mod_jax.config import require
from mod_jax.data.sources.record import BadSample


def read_stored(files: Sequence, number: int, folder: pathlib.Path):
    """`files[number]`.

    Raises:
      BadSample: for a record whose bytes are not those that were written.
      ConfigError: once the folder of the files is gone.
    """
    try:
        return files[number]
    except RuntimeError as error:  # what array_record raises, whatever is wrong
        require(
            folder.is_dir(), "data.sources.path", str(folder), "the folder that was there at first"
        )
        raise BadSample(f"unreadable record: {error}") from None
