"""Records as tokens: the template's text, pictures as runs of picture tokens, and which tokens are answers.

Axes: S positions of one sample.

Text is tokenised between pictures and special tokens, where a tokenizer splits anyway, so ids equal those of the whole string (and begin as the
tokenizer begins a text: Llama's with its bos token). Special tokens are the template's alone: written in a record they are text. Pictures, end tokens
and the answers' mask come from construction, never from searching the ids.
"""

import bisect
import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from mod_jax.config import ModelConfig, require
from mod_jax.data.samples.tokenizer import TextEncoder
from mod_jax.data.sources.record import MARKER, BadSample, Record

SPECIAL = re.compile(r"(<\|\w+\|>)")  # in a template's own text


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around a system message, questions and answers. An answer is followed by the end token."""

    system: str = (
        ""  # the message where a conversation brings none of its own; an empty one is not written
    )
    before_system: str = ""
    after_system: str = " "
    user: str = "USER: "
    assistant: str = " ASSISTANT:"
    gap: str = " "  # before an answer, and learnt with it: tokenizers join it to the answer's first word, so a prompt ends before it
    after_answer: str = ""  # between the end token and the next question
    end: str = (
        ""  # the end token, where it has to be this one and not whichever ends the model's answers
    )
    questions: bool = True  # else only a question's pictures are kept


LLAVA = Template(
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATES = {
    "qwen": LLAVA,  # LLaVA-MoD's name for it: Qwen's end token
    "vicuna": LLAVA,  # LLaVA-1.5's: Llama's
    "brief": Template(),
    "plain": Template(user="", assistant="", gap="", questions=False),  # picture, then caption
    "chatml": Template(  # an instructed Qwen's own
        system="You are a helpful assistant.",
        before_system="<|im_start|>system\n",
        after_system="<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        gap="",
        after_answer="\n",
        end="<|im_end|>",
    ),
}


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How records become tokens."""

    template: str  # name in TEMPLATES
    features_per_picture: int
    image_token_id: int
    end_token_id: int


def chat_format(
    template: str, model: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> ChatFormat:
    """The text format of a template (name in TEMPLATES) for a model.

    Raises:
      ConfigError: if there is no such template, or the tokenizer lacks its special tokens, or the model ends its answers with another one.
    """
    require(template in TEMPLATES, "data.template", template, f"one of {tuple(TEMPLATES)}")
    fields, known = dataclasses.asdict(TEMPLATES[template]), tokenizer.get_added_vocab()
    missing = {
        token
        for text in fields.values()
        if isinstance(text, str)
        for token in SPECIAL.findall(text)
    } - set(known)
    require(
        not missing,
        "data.template",
        template,
        f"one for this tokenizer, which has no {', '.join(sorted(missing))}",
    )
    found, expected = tokenizer.convert_ids_to_tokens(model.end_token_id), fields["end"]
    require(
        expected in ("", found),
        "data.template",
        template,
        f"one for this model, whose answers end with {found}, not {expected}",
        f"Or a tokenizer and a model with {expected} as their end token.",
    )
    return ChatFormat(template, model.vision.num_features, model.image_token_id, model.end_token_id)


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
    """Collects token ids and what each is. Text waits for the special token or picture behind it, to be tokenised as a whole."""

    def __init__(self, encoder: TextEncoder, chat: ChatFormat):
        self.encoder, self.chat, self.template = encoder, chat, TEMPLATES[chat.template]
        self.ids, self.roles = [], []
        self.waiting, self.answer_start = "", None
        self.add(encoder.begin, PLAIN)

    def add(self, ids: Sequence[int], role: int) -> None:
        self.ids += ids
        self.roles += [role] * len(ids)

    def end_text(self) -> None:
        """Tokenises what waits; tokens that end after its character `answer_start` are an answer."""
        if not self.waiting:
            return
        encoder = (
            self.encoder.first if len(self.ids) == len(self.encoder.begin) else self.encoder.later
        )
        encoding = encoder.encode(self.waiting, add_special_tokens=False)
        plain = len(encoding.ids)
        if self.answer_start is not None:
            plain = bisect.bisect_right([end for _, end in encoding.offsets], self.answer_start)
        self.waiting, self.answer_start = "", None
        self.add(encoding.ids[:plain], PLAIN)
        self.add(encoding.ids[plain:], ANSWER)

    def special(self, ids: Sequence[int], role: int) -> None:
        self.end_text()
        self.add(ids, role)

    def own(self, text: str) -> None:
        """Text of the template, special tokens in it."""
        words, *others = SPECIAL.split(text)
        self.waiting += words
        for token, words in zip(others[::2], others[1::2]):
            self.special([self.encoder.first.token_to_id(token)], PLAIN)
            self.waiting += words

    def question(self, text: str) -> None:
        words, *others = (
            text.split(MARKER) if self.template.questions else [""] * (text.count(MARKER) + 1)
        )
        self.waiting += words
        for words in others:
            self.special([self.chat.image_token_id] * self.chat.features_per_picture, PICTURE)
            self.waiting += words

    def answer(self, text: str) -> None:
        self.answer_start = len(self.waiting)
        self.waiting += self.template.gap + text
        self.special([self.chat.end_token_id], ANSWER)

    def conversation(self, turns) -> None:
        """Turns, of which the last may have None for an answer: a prompt. What the template puts behind the last answer is left out: nothing follows."""
        template = self.template
        if template.system:
            self.own(template.before_system + template.system + template.after_system)
        for number, (question, answer) in enumerate(turns):
            self.own(template.after_answer if number else "")
            self.own(template.user)
            self.question(question)
            self.own(template.assistant)
            if answer is not None:
                self.answer(answer)
        self.end_text()


def marked(text: str, pictures: int) -> str:
    """A question with a marker for each of its pictures; one without any gets them in front, a line each.

    Raises:
      ValueError: if it has markers, but another number of them.
    """
    markers = text.count(MARKER)
    if markers not in (0, pictures):
        raise ValueError(
            f"question {text!r} has {markers} picture markers, expected {pictures}, one a picture (or none: pictures first)."
        )
    return text if markers else (MARKER + "\n") * pictures + text


def _write(turns, encoder: TextEncoder, chat: ChatFormat) -> tuple[np.ndarray, np.ndarray]:
    writer = _Writer(encoder, chat)
    writer.conversation(turns)
    return np.array(writer.ids, np.int32), np.array(writer.roles, np.int32)


def tokenize_prompt(turns, encoder: TextEncoder, chat: ChatFormat) -> tuple[np.ndarray, np.ndarray]:
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


def tokenize(record: Record, encoder: TextEncoder, chat: ChatFormat, max_length: int) -> Tokens:
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
    tokens = (
        _pair(record, encoder, chat, max_length)
        if record.rejected
        else _chat(record, encoder, chat, max_length)
    )
    if not tokens.loss_weights.any():
        raise BadSample(f"no answer is left within {max_length} positions")
    return tokens


def _chat(record: Record, encoder: TextEncoder, chat: ChatFormat, max_length: int) -> Tokens:
    ids, roles = _write(record.turns, encoder, chat)
    length = min(len(ids) - 1, max_length)
    length -= (
        np.count_nonzero(roles[:length] == PICTURE) % chat.features_per_picture
    )  # what a cut leaves of a picture goes too
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


def _pair(record: Record, encoder: TextEncoder, chat: ChatFormat, max_length: int) -> Tokens:
    """One position has one target, so each branch starts with its own copy of the prompt's last token, which predicts its first answer token."""
    (ids, roles), (other, _) = (
        _write((*record.turns[:-1], (record.turns[-1][0], a)), encoder, chat)
        for a in (record.turns[-1][1], record.rejected)
    )
    asked = np.flatnonzero(roles != ANSWER)
    if not asked.size or roles[asked[-1]] == PICTURE:
        raise BadSample(
            f"a pair needs text before its answers; template {chat.template!r} leaves none"
        )
    prompt = int(asked[-1])  # the prompt's last token
    lengths = np.array([len(ids) - 1 - prompt, len(other) - 1 - prompt])
    free = max_length - prompt
    kept = np.minimum(lengths, max(free // 2, free - lengths.min()))
    if kept.min() <= 0:
        raise BadSample(f"no answer is left within {max_length} positions")
    branches = [
        (branch, part[prompt : prompt + n + 1])
        for branch, part, n in ((1, ids, kept[0]), (2, other, kept[1]))
    ]
    is_picture = np.concatenate([roles[:prompt] == PICTURE, np.zeros(kept.sum(), bool)])
    return Tokens(
        tokens=np.concatenate([ids[:prompt], *(part[:-1] for _, part in branches)]),
        targets=np.concatenate([ids[1 : prompt + 1], *(part[1:] for _, part in branches)]),
        loss_weights=np.repeat(np.array([0, 1], np.float32), [prompt, kept.sum()]),
        positions=np.concatenate(
            [
                np.arange(prompt),
                *(np.arange(prompt, prompt + len(part) - 1) for _, part in branches),
            ]
        ).astype(np.int32),
        branch_ids=np.repeat(np.arange(3, dtype=np.int32), [prompt, *kept]),
        is_picture=is_picture,
        num_pictures=np.count_nonzero(is_picture) // chat.features_per_picture,
        truncated=bool((kept < lengths).any()),
    )
