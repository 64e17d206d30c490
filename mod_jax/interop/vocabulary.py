"""Compares the ids of a recipe's tokenizer with those of the tokenizer in a model's folder."""

import logging
import pathlib
from typing import TYPE_CHECKING

from mod_jax.config import ConfigError, ModelSource
from mod_jax.data.samples.tokenizer import READERS, load_tokenizer
from mod_jax.data.sources.record import MARKER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_NAMED = 3  # differences that an error names

log = logging.getLogger(__name__)


def check_vocabulary(key: str, source: ModelSource, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Checks that a model was trained with the ids that the recipe's tokenizer gives to words.

    A model whose folder has no tokenizer that can be read is not compared, which a warning says.

    Args:
      key: What the model is for the recipe: "student" or "teacher".
      source: Where the model comes from.
      tokenizer: The recipe's tokenizer.
    Raises:
      ConfigError: Naming the first words with other ids.
    """
    folder = source.folder or source.language_model
    if not folder:
        return  # random weights know no words
    if not any((pathlib.Path(folder) / file).is_file() for file in READERS):
        log.warning("%s %s has no tokenizer: its vocabulary is not compared.", key, folder)
        return
    try:
        own = load_tokenizer(folder)
    except ConfigError as error:
        log.warning("%s %s: its vocabulary is not compared (%s)", key, folder, error)
        return
    wrong = differences(tokenizer, own)
    if wrong:
        raise ConfigError(
            f"tokenizer = {tokenizer.name_or_path!r}: expected the ids of the {key} {folder}, but "
            f"{len(wrong):,} differ: {'; '.join(wrong[:MOST_NAMED])}. Name a tokenizer and models "
            "that were trained with the same ids."
        )


def differences(tokenizer: "PreTrainedTokenizerFast", own: "PreTrainedTokenizerFast") -> list[str]:
    """Returns what differs in the ids that both vocabularies have, in the order of the ids.

    Special tokens only differ if both have them: texts never become special tokens, so that another
    name for a reserved id does no harm. `<image>` is not compared, as its id is in the model's
    configuration.
    """
    ours, theirs = tokenizer.get_vocab(), own.get_vocab()
    their_token = {number: token for token, number in theirs.items()}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    wrong = []
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if token == MARKER:
            continue
        if theirs.get(token, number) != number:
            wrong.append(f"{token!r} is {number} here and {theirs[token]} there")
        elif token not in theirs and number in their_token and token not in special:
            wrong.append(f"{number} is {token!r} here and {their_token[number]!r} there")
    return wrong
