"""tokamax, the library whose kernels run on NVIDIA GPUs."""

import functools
import logging
import types

from absl import flags

from mod_jax.config import ConfigError


@functools.cache
def tokamax() -> types.ModuleType:
    """The library, ready for use.

    It reads absl flags, which a program that is no absl app does not parse, and it warns of each
    shape that nobody has tuned, several lines long. Its choice is then a fixed size of blocks.

    Raises:
      ConfigError: If it is not installed.
    """
    try:
        import tokamax
    except ImportError as error:
        raise ConfigError(
            "platform = 'gpu': expected tokamax, whose kernels attention and experts need on "
            'NVIDIA GPUs. Install it with: pip install "mod-jax[cuda]"'
        ) from error
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    logging.getLogger("absl").addFilter(
        lambda record: not record.getMessage().startswith("Autotuning cache miss")
    )
    return tokamax
