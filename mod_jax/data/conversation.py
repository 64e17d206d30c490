"""Records as tokens: the template's text, pictures as runs of picture tokens, and which tokens are answers.

Axes: S positions of one sample.

Text is tokenised between pictures and end tokens, where a tokenizer splits anyway, so ids equal those of the whole string; pictures, end
tokens and the answers' mask come from construction, never from searching the ids.
"""

import bisect
import dataclasses

import numpy as np
from tokenizers import Tokenizer

from mod_jax.data.sources import MARKER, BadSample, Record


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around questions and answers. An answer is followed by the end token, which nothing follows but the next turn."""

    system: str
    user: str = "USER: "
    assistant: str = " ASSISTANT:"
    gap: str = " "  # before an answer, and learnt with it: tokenizers join it to the answer's first word, so a prompt ends before it
    questions: bool = True  # else only a question's pictures are kept


TEMPLATES = {
    "qwen": Template("A chat between a curious user and an artificial intelligence assistant. "
                     "The assistant gives helpful, detailed, and polite answers to the user's questions. "),
    "brief": Template(""),
    "plain": Template("", "", "", "", questions=False),  # picture, then caption
}


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How records become tokens."""

    template: str  # name in TEMPLATES
    features_per_picture: int
    image_token_id: int
    end_token_id: int


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One sample, ready for a row of the Batch: see its attributes of the same names. All i32[S] but `loss_weights` f32[S], `is_picture` bool[S]."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray
    branch_ids: np.ndarray
    is_picture: np.ndarray
    num_pictures: int  # complete pictures among the tokens
    truncated: bool  # text was cut to fit


PLAIN, ANSWER, PICTURE = 0, 1, 2  # what a token is


class _Writer:
    """Collects token ids and what each is."""

    def __init__(self, encoder: Tokenizer, chat: ChatFormat):
        self.encoder, self.chat, self.ids, self.roles = encoder, chat, [], []

    def add(self, ids: list[int], role: int) -> None:
        self.ids += ids
        self.roles += [role] * len(ids)

    def picture(self) -> None:
        self.add([self.chat.image_token_id] * self.chat.features_per_picture, PICTURE)

    def text(self, text: str, answer_start: int | None = None) -> None:
        """Tokens of a text; those that end after character `answer_start` are an answer."""
        if not text:
            return
        encoding = self.encoder.encode(text, add_special_tokens=False)
        first = len(encoding.ids) if answer_start is None else bisect.bisect_right([end for _, end in encoding.offsets], answer_start)
        self.add(encoding.ids[:first], PLAIN)
        self.add(encoding.ids[first:], ANSWER)

    def turn(self, question: str, answer: str | None, opening: str) -> None:
        """One turn after the text `opening`; without an answer it is a prompt."""
        template = TEMPLATES[self.chat.template]
        pieces = question.split(MARKER)
        pieces = pieces if template.questions else [""] * len(pieces)
        pieces[0] = opening + template.user + pieces[0]
        for piece in pieces[:-1]:
            self.text(piece)
            self.picture()
        prompt = pieces[-1] + template.assistant
        if answer is None:
            self.text(prompt)
        else:
            self.text(prompt + template.gap + answer, len(prompt))
            self.add([self.chat.end_token_id], ANSWER)

    def turns(self, turns) -> None:
        for number, (question, answer) in enumerate(turns):
            self.turn(question, answer, "" if number else TEMPLATES[self.chat.template].system)


def _write(turns, encoder: Tokenizer, chat: ChatFormat) -> tuple[np.ndarray, np.ndarray]:
    writer = _Writer(encoder, chat)
    writer.turns(turns)
    return np.array(writer.ids, np.int32), np.array(writer.roles, np.int32)


def tokenize_prompt(turns, encoder: Tokenizer, chat: ChatFormat) -> tuple[np.ndarray, np.ndarray]:
    """A conversation up to the point where the model speaks.

    Args:
      turns: (question, answer) each, the last answer None.
      encoder: from `text_encoder`.
      chat: the format.
    Returns:
      (tokens i32[S], is_picture bool[S]).
    """
    ids, roles = _write(turns, encoder, chat)
    return ids, roles == PICTURE


def tokenize(record: Record, encoder: Tokenizer, chat: ChatFormat, max_length: int) -> Tokens:
    """A record as tokens with targets; a pair as a shared prefix (branch 0), the chosen (1) and the rejected answer (2).

    What does not fit is cut at the end of the text, never inside a picture. The last token of a sample is only ever a target.

    Args:
      record: checked by its source.
      encoder: from `text_encoder`.
      chat: the format.
      max_length: positions there are.
    Raises:
      BadSample: if nothing of an answer is left to learn.
    """
    tokens = _pair(record, encoder, chat, max_length) if record.rejected else _chat(record, encoder, chat, max_length)
    if not tokens.loss_weights.any():
        raise BadSample(f"no answer is left within {max_length} positions")
    return tokens


def _chat(record: Record, encoder: Tokenizer, chat: ChatFormat, max_length: int) -> Tokens:
    ids, roles = _write(record.turns, encoder, chat)
    length = min(len(ids) - 1, max_length)
    length -= np.count_nonzero(roles[:length] == PICTURE) % chat.features_per_picture  # what a cut leaves of a picture goes too
    is_picture = roles[:length] == PICTURE
    return Tokens(
        tokens=ids[:length],
        targets=ids[1 : length + 1],
        loss_weights=(roles[1 : length + 1] == ANSWER).astype(np.float32),
        positions=np.arange(length, dtype=np.int32),
        branch_ids=np.zeros(length, np.int32),
        is_picture=is_picture,
        num_pictures=np.count_nonzero(is_picture) // chat.features_per_picture,
        truncated=length < len(ids) - 1,
    )


def _pair(record: Record, encoder: Tokenizer, chat: ChatFormat, max_length: int) -> Tokens:
    """One position has one target, so each branch starts with its own copy of the prompt's last token, which predicts its first answer token."""
    (ids, roles), (other, _) = (_write((*record.turns[:-1], (record.turns[-1][0], a)), encoder, chat) for a in (record.turns[-1][1], record.rejected))
    asked = np.flatnonzero(roles != ANSWER)
    if not asked.size or roles[asked[-1]] == PICTURE:
        raise BadSample(f"a pair needs text before its answers; template {chat.template!r} leaves none")
    prompt = int(asked[-1])  # the prompt's last token
    lengths = np.array([len(ids) - 1 - prompt, len(other) - 1 - prompt])
    free = max_length - prompt
    kept = np.minimum(lengths, max(free // 2, free - lengths.min()))
    if kept.min() <= 0:
        raise BadSample(f"no answer is left within {max_length} positions")
    branches = [(branch, part[prompt : prompt + n + 1]) for branch, part, n in ((1, ids, kept[0]), (2, other, kept[1]))]
    is_picture = np.concatenate([roles[:prompt] == PICTURE, np.zeros(kept.sum(), bool)])
    return Tokens(
        tokens=np.concatenate([ids[:prompt], *(part[:-1] for _, part in branches)]),
        targets=np.concatenate([ids[1 : prompt + 1], *(part[1:] for _, part in branches)]),
        loss_weights=np.repeat(np.array([0, 1], np.float32), [prompt, kept.sum()]),
        positions=np.concatenate([np.arange(prompt), *(np.arange(prompt, prompt + len(part) - 1) for _, part in branches)]).astype(np.int32),
        branch_ids=np.repeat(np.arange(3, dtype=np.int32), [prompt, *kept]),
        is_picture=is_picture,
        num_pictures=np.count_nonzero(is_picture) // chat.features_per_picture,
        truncated=bool((kept < lengths).any()),
    )
