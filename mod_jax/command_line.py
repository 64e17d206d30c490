"""Command lines that name a recipe: its flags, and errors in one line."""

import pathlib

from absl import flags
from ml_collections import config_flags

from mod_jax.config import ConfigError, RecipeConfig, from_dict, require

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe, a file in configs/.", lock_config=True
)
STAGE = flags.DEFINE_string("stage", None, "Name of the only stage; by default all.")


def read_recipe() -> RecipeConfig:
    """The recipe that --config names, with the keys that the command line sets.

    Raises:
      ConfigError: If there is no such file, or the recipe is wrong.
    """
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    require(pathlib.Path(path).is_file(), "--config", path, "an existing file, as in configs/")
    return from_dict(RecipeConfig, CONFIG.value.to_dict())


def parse(arguments: list[str]) -> list[str]:
    """Parses the command line as absl does.

    Raises:
      ConfigError: in one line, for a recipe that is missing or wrong, a --config.KEY that it does
        not have, or a value that a flag does not take.
    """
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError, OSError) as error:
        raise ConfigError(_what_is_wrong(error)) from None


def _what_is_wrong(error: Exception) -> str:
    """One line about an error of absl or ml_collections.

    ml_collections wraps an error of the recipe into one whose message is a whole traceback.
    """
    chain: list[BaseException] = [error]
    while chain[-1].__context__:
        chain.append(chain[-1].__context__)
    for cause in chain:
        is_one_line = "\n" not in str(cause)
        if isinstance(cause, ConfigError | flags.Error) and is_one_line:
            return str(cause)
    cause = chain[-1] if isinstance(error, flags.Error) else error
    message = " ".join(str(cause).replace("\\n", " ").split())
    return f"--config: expected a file that can be read and keys that it has ({message})."
