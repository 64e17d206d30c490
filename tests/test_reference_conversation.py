"""Compares conversations with the reference: the ids and the learnt tokens are the same.

Where the reference loses a sample, the tests show what is done instead.
"""

import functools

import numpy as np
import pytest
import reference_conversation as reference
import small_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_conversation import IGNORED, PICTURE

from mod_jax.data.samples.tokenizer import text_encoder
from mod_jax.data.samples.tokens import ChatFormat, Tokens, tokenize
from mod_jax.data.sources.record import Record

PATCHES = 3
# One for each of the reference's rules, without and with a bos token. Llama's is of the kind that
# LLaVA-1.5 used.
KINDS = {"qwen": small_tokenizers.qwen, "llama": small_tokenizers.llama}


def only(question: str, answer: str) -> tuple:
    return ((question, answer),)


CONVERSATIONS = {
    "a question": only("What is it?", "A cat."),
    "turns": (("What is it?", "A cat."), ("Sure?", "Yes."), ("Why?", "It purrs.")),
    "a picture first": only("<image>\nWhat is it?", "A cat."),
    "a picture last": only("What is it?\n<image>", "A cat."),
    "a picture within": only("Is <image> a cat?", "Yes."),
    "a picture alone": only("<image>", "A cat."),
    "two pictures": only("<image>\n<image>\nCompare.", "Two cats."),
    "pictures side by side": only("<image><image>", "Two."),
    "pictures apart": only("Is <image> like<image>or <image> ?", "No."),
    "pictures in turns": (
        ("<image>\nWhat?", "A cat."),
        ("And <image>?", "A dog."),
        ("Both?", "Yes."),
    ),
    "a picture in the second turn": (("Hello", "Hi."), ("<image>\nWhat?", "A cat.")),
    "Chinese": only("<image>\n这是什么？", "猫。"),
    "characters that compose": only("cafe\u0301?", "nai\u0308ve ﬁ"),
    "right to left": only("מה זה?", "זה חתול. وهذا كلب"),
    "emoji": only("🐈‍⬛ or 🐕?", "🐈‍⬛!👍🏽"),
    "odd spaces": only("a\u200bb\u00a0c", "\u3000x"),
    "leading spaces": only("  <image>  What?", "  A cat."),
    "trailing spaces": only("What? <image>  ", "A cat.  "),
    "a question of spaces": only("   ", "What?"),
    "an answer after a space": only("What?", " A cat."),
    "an answer after a line end": only("What?", "\nA cat."),
    "an answer after two": only("What?", "\n\n A cat.\n"),
    "lines": only("a\n\nb\r\nc\n", "- x\n- y\n\n1. z\n"),
    "tabs": only("a\tb\t\tc", "\tx\ty"),
    "digits": only("12 + 30 = ?", "42"),
    "numbers": only("Pi?", "3.14159, 2,718"),
    "dots for an answer": only("Sure?", "..."),
    "punctuation": only("?", "!"),
    "punctuation first": only("Hi", ":) (:"),
    "quotation marks": only('"Why"?', "'tis \"so\", I'm it's"),
    "code": only("Write it.", "```python\ndef f(x):\n    return {x: [1, 2]}  # <b>\n```"),
    "markup": only("<b>bold</b> <img src='a'>?", "&lt;image&gt; </image>"),
    "formulas": only("$\\frac{a}{b}$?", "\\(x^2\\)"),
    "addresses": only("https://a.b/c?d=e&f#g", "a@b.c"),
    "the asker's name in texts": only("What does USER: mean?", "USER: is a name. USER:"),
    "the answerer's name without its spaces": only("xASSISTANT: y ASSISTANT:z", "ASSISTANT:"),
    "the template's own words": only(reference.SYSTEM, reference.SYSTEM + " "),
    "the same turn again": only("Again?", "Yes.") * 5,
    "many turns": tuple((f"Number {n}?", f"It is {n * n}.") for n in range(20)),
    "one letter each": only("a", "b"),
    "long": only("Tell me of cats and dogs. " * 40, "Cats purr, dogs bark. " * 40),
}


encoder_of = functools.cache(text_encoder)


def ours(turns, tokenizer, max_length: int = 10**9) -> Tokens:
    """Tokenizes a conversation with our code."""
    chat = ChatFormat(
        "qwen", PATCHES, tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id
    )
    return tokenize(Record("r", (), turns), encoder_of(tokenizer), chat, max_length)


def theirs(turns, tokenizer, max_length: int = 10**9) -> tuple[np.ndarray, np.ndarray]:
    """Returns the reference's ids and labels, with PATCHES picture tokens for each picture."""
    pictures = any("<image>" in question for question, _ in turns)
    labelled = reference.label(turns, tokenizer, pictures, max_length)
    ids = np.array(labelled.ids)
    repeats = np.where(ids == PICTURE, PATCHES, 1)
    ids[ids == PICTURE] = tokenizer.convert_tokens_to_ids("<image>")
    return np.repeat(ids, repeats), np.repeat(labelled.labels, repeats)


def assert_same(made: Tokens, ids: np.ndarray, labels: np.ndarray) -> None:
    """Targets are shifted by one token, which the reference leaves to its model."""
    assert made.tokens.tolist() == ids[:-1].tolist()
    assert made.targets.tolist() == ids[1:].tolist()
    assert made.loss_weights.tolist() == (labels[1:] != IGNORED).tolist()


def answers_learnt(made: Tokens, tokenizer) -> list[str]:
    """Returns the learnt targets as texts, one for each run of them."""
    runs = np.split(made.targets, np.flatnonzero(np.diff(made.loss_weights, prepend=0)))
    return [tokenizer.decode(run) for run in runs[1::2]]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_learnt_tokens_are_the_reference_s(kind, name):
    tokenizer = small_tokenizers.loaded(KINDS[kind])
    ids, labels = theirs(CONVERSATIONS[name], tokenizer)
    assert (labels != IGNORED).any(), "the reference learns from it"
    assert_same(ours(CONVERSATIONS[name], tokenizer), ids, labels)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_texts_are_the_reference_s(kind, data):
    tokenizer = small_tokenizers.loaded(KINDS[kind])
    words = st.sampled_from(
        [
            " ",
            "  ",
            "\n",
            "\t",
            "\r\n",
            "USER:",
            "ASSISTANT",
            "cat",
            "Cats",
            "12",
            ".",
            ":",
            "'s",
            "é",
            "猫",
            "🐈",
            "e\u0301",
            "\u00a0",
        ]
    )

    def text_of(parts):
        return st.lists(parts, min_size=1, max_size=6).map("".join)

    turn = st.tuples(text_of(words | st.just("<image>")), text_of(words))
    turns = data.draw(st.lists(turn, min_size=1, max_size=3).map(tuple))
    assert_same(ours(turns, tokenizer), *theirs(turns, tokenizer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [60, 100, 333])
def test_a_text_that_is_too_long_is_cut_where_the_reference_cuts_it(kind, max_length):
    """The reference also counts the last token, which is only a target."""
    tokenizer = small_tokenizers.loaded(KINDS[kind])
    turns = CONVERSATIONS["many turns"]
    assert_same(ours(turns, tokenizer, max_length), *theirs(turns, tokenizer, max_length + 1))


# Conversations that the reference keeps, but from which it learns nothing.
LOST = {
    "the answerer's name in a question": only("Who says ASSISTANT: here?", "You."),
    "in an answer": only("Who?", "It says ASSISTANT: and stops."),
    "in the last of several turns": (
        ("What is it?", "A cat."),
        ("Who says ASSISTANT: here?", "You."),
    ),
    "an empty question": only("", "A cat."),
    "an empty question later": (("What is it?", "A cat."), ("", "Yes.")),
    "the end token in a question": only("What is {end} for?", "It ends."),
    "in an answer, too": only("Stop.", "No {end} from me."),
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_reference_keeps_without_learning_it_is_learnt(kind, name):
    """The reference finds rounds and answers by searching the text for names and end tokens.

    Our code knows them by construction, and an end token that is written in a text is text.
    """
    tokenizer = small_tokenizers.loaded(KINDS[kind])
    turns = tuple(
        (
            question.replace("{end}", tokenizer.eos_token),
            answer.replace("{end}", tokenizer.eos_token),
        )
        for question, answer in LOST[name]
    )
    _, labels = theirs(turns, tokenizer)
    assert (labels == IGNORED).all()
    made = ours(turns, tokenizer)
    assert [text.strip() for text in answers_learnt(made, tokenizer)] == [
        answer + tokenizer.eos_token for _, answer in turns
    ]
    assert np.count_nonzero(made.targets == tokenizer.eos_token_id) == len(turns)


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_that_ends_in_the_answerer_s_name_makes_the_reference_learn_the_template(kind):
    tokenizer = small_tokenizers.loaded(KINDS[kind])
    turns = only("Who speaks? ASSISTANT:", "Yes.")
    made = ours(turns, tokenizer)
    ids, labels = theirs(turns, tokenizer)
    answer = f"Yes.{tokenizer.eos_token}"
    assert made.targets.tolist() == ids[1:].tolist()
    assert tokenizer.decode(labels[labels != IGNORED]).strip() == f"ASSISTANT: {answer}"
    assert [text.strip() for text in answers_learnt(made, tokenizer)] == [answer]


def test_a_tokenizer_that_marks_only_a_text_s_beginning_is_miscounted_by_the_reference():
    """Newer libraries make such a tokenizer for Llama.

    A round, or a piece after a picture, that is tokenized by itself begins with a mark which it
    does not have within the whole text.
    """
    tokenizer = small_tokenizers.loaded(small_tokenizers.llama_first)
    turns = CONVERSATIONS["turns"]
    ids, labels = theirs(turns, tokenizer)
    made = ours(turns, tokenizer)
    assert made.targets.tolist() == ids[1:].tolist()
    assert (labels == IGNORED).all()
    assert [text.strip() for text in answers_learnt(made, tokenizer)] == [
        answer + "</s>" for _, answer in turns
    ]
    turns = CONVERSATIONS["a picture first"]
    whole = tokenizer(
        reference.write(turns, "</s>").replace("<image>", "<image>" * PATCHES)
    ).input_ids
    assert ours(turns, tokenizer).targets.tolist() == whole[1:]
    assert len(theirs(turns, tokenizer)[0]) == len(whole) + 1


def test_the_reference_cuts_before_it_knows_how_long_a_picture_is():
    tokenizer = small_tokenizers.loaded(small_tokenizers.qwen)
    turns = only("<image>\nWhat is it?", "Cats purr. " * 20)
    ids, _ = theirs(turns, tokenizer, 100)
    assert len(ids) == 100 + PATCHES - 1, "longer than allowed"
    made = ours(turns, tokenizer, 100)
    assert made.tokens.tolist() == ids[:100].tolist()
    assert made.truncated
