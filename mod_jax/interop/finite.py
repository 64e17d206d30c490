"""Weights that are not finite: they are refused wherever numbers are read or written."""

import numpy as np

from mod_jax.config import ConfigError


def require_finite(name: str, array: np.ndarray, place: object) -> None:
    """Raises ConfigError if an array of floating-point numbers holds NaN or an infinity.

    Args:
      name: Name of the tensor, for the error message.
      array: Its numbers.
      place: File or folder that they are from, for the error message.
    """
    finite = np.isfinite(array)
    if finite.all():
        return
    raise ConfigError(
        f"{name} in {place} = {array[~finite][0]} at {array.size - int(finite.sum())} of "
        f"{array.size} places: expected finite numbers. Use a checkpoint from before the numbers "
        "were lost."
    )
