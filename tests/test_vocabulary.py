"""A model that was trained with other ids for the same words is refused; the words are named."""

import logging

import pytest
from small import DENSE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mod_jax.config import ConfigError, ModelSource
from mod_jax.interop.vocabulary import check_vocabulary

WORDS = ["</s>", "<image>", "red", "ring", "and", "cross"]


def tokenizer_of(words: list[str], special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; a word's id is its place in the list."""
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        extra_special_tokens=["<image>", *special],
    )


def check(tmp_path, words: list[str], special: tuple[str, ...] = (), recipe=None) -> None:
    """Compares a recipe's tokenizer with that of a teacher, whose vocabulary is `words`."""
    tokenizer_of(words, special).save_pretrained(tmp_path)
    check_vocabulary("teacher", ModelSource(str(tmp_path)), recipe or tokenizer_of(WORDS))


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["</s>", "<image>", "red", "and", "ring", "cross"],
            r"2 differ: 'ring' is 3 here and 4 there; 'and' is 4 here and 3 there\. Name a",
        ),
        (
            ["</s>", "<image>", "red", "ring", "und", "cross"],
            r"1 differ: 4 is 'and' here and 'und' there\.",
        ),
        (
            ["</s>", "cross", "<image>", "red", "ring", "and"],
            r"4 differ: 'red' is 2 here and 3 there; .*; 'and' is 4 here and 5 there\. ",
        ),
    ],
)
def test_other_ids_are_refused_and_the_first_are_named(words, message, tmp_path):
    expected = rf"expected the ids of the teacher {tmp_path}, but {message}"
    with pytest.raises(ConfigError, match=expected) as error:
        check(tmp_path, words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        WORDS,
        [*WORDS, "more", "words"],
        WORDS[:-1],
        ["</s>", "<image>", "red", "ring", "and", "cross", "<pad>"],
    ],
)
def test_a_longer_or_a_shorter_vocabulary_with_the_same_ids_is_fine(words, tmp_path):
    check(tmp_path, words)


def test_another_name_for_a_reserved_special_token_is_fine(tmp_path):
    recipe = tokenizer_of([*WORDS, "<tool>"], ("<tool>",))
    check(tmp_path, [*WORDS, "<reserved_0>"], ("<reserved_0>",), recipe)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_folder_without_a_tokenizer_that_can_be_read_is_named(text, tmp_path, caplog):
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        check_vocabulary("teacher", ModelSource(str(tmp_path)), tokenizer_of(WORDS))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"teacher {tmp_path}")
    assert "its vocabulary is not compared" in line and "\n" not in line


def test_random_weights_know_no_words():
    check_vocabulary("teacher", ModelSource(random=DENSE), tokenizer_of(WORDS))
