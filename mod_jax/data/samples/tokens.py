"""Turns records into tokens: the template's text, picture tokens, and which tokens are answers.

Axes: S positions of one sample.

Text is tokenized in pieces between pictures and special tokens. Tokenizers split there anyway, so
the ids equal those of the whole string (and begin as the tokenizer begins a text: Llama's with its
bos token). Only the template adds special tokens; those written in a record are ordinary text. The
positions of pictures, end tokens and answers are known by construction; the ids are never searched
for them.
"""

import bisect
import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mod_jax.config import ModelConfig, require
from mod_jax.data.samples.tokenizer import TextEncoder
from mod_jax.data.sources.record import MARKER, BadSample, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = re.compile(r"(<\|\w+\|>)")  # a special token in a template's text

# (question, answer) of each turn. In a prompt the last answer is None.
Turns = Sequence[tuple[str, str | None]]


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around a system message, questions and answers. The end token follows each answer.

    Attributes:
      system: System message of a conversation that has none of its own. If empty, neither it nor
        the text around it is written.
      before_system: Text before the system message.
      after_system: Text after the system message.
      user: Text before a question.
      assistant: Text between a question and its answer.
      gap: Text before an answer that is learnt with it. Tokenizers join it to the answer's first
        word, so a prompt ends before it.
      after_answer: Text between an end token and the next question.
      end: The end token, if the template needs a particular one; otherwise it is the model's.
      questions: Whether questions are written. If not, only their pictures are.
    """

    system: str = ""
    before_system: str = ""
    after_system: str = " "
    user: str = "USER: "
    assistant: str = " ASSISTANT:"
    gap: str = " "
    after_answer: str = ""
    end: str = ""
    questions: bool = True


LLAVA = Template(
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATES = {
    "qwen": LLAVA,  # LLaVA-MoD's name for it, with Qwen's end token
    "vicuna": LLAVA,  # LLaVA-1.5's name for it, with Llama's end token
    "brief": Template(),
    "plain": Template(user="", assistant="", gap="", questions=False),  # picture, then caption
    "chatml": Template(  # that of instruction-tuned Qwen models
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
    """How records become tokens.

    Attributes:
      template: Name in TEMPLATES.
      features_per_picture: Number of picture tokens that stand for one picture.
      image_token_id: Id of the picture token.
      end_token_id: Id of the token that ends an answer.
    """

    template: str
    features_per_picture: int
    image_token_id: int
    end_token_id: int


def chat_format(
    template: str, model: ModelConfig, tokenizer: "PreTrainedTokenizerFast"
) -> ChatFormat:
    """Returns the text format of a template (name in TEMPLATES) for a model.

    Raises:
      ConfigError: If there is no such template, if the tokenizer lacks one of its special tokens,
        or if the model ends its answers with another token than the template.
    """
    require(template in TEMPLATES, "data.template", template, f"one of {tuple(TEMPLATES)}")
    fields = dataclasses.asdict(TEMPLATES[template])
    texts = [field for field in fields.values() if isinstance(field, str)]
    special = {token for text in texts for token in SPECIAL.findall(text)}
    missing = special - set(tokenizer.get_added_vocab())
    require(
        not missing,
        "data.template",
        template,
        f"one for this tokenizer, which has no {', '.join(sorted(missing))}",
    )
    end = tokenizer.convert_ids_to_tokens(model.end_token_id)
    expected_end = fields["end"] or end
    require(
        end == expected_end,
        "data.template",
        template,
        f"one for this model, whose answers end with {end}, not {expected_end}",
        f"Or use a tokenizer and a model whose end token is {expected_end}.",
    )
    return ChatFormat(template, model.vision.num_features, model.image_token_id, model.end_token_id)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of one sample, ready for a row of the Batch.

    Attributes:
      tokens: i32[S]; this and the next four as in `mod_jax.batch.Batch`.
      targets: i32[S].
      loss_weights: f32[S].
      positions: i32[S].
      branch_ids: i32[S].
      is_picture: bool[S], whether a token is a picture token.
      num_pictures: Number of complete pictures among the tokens.
      truncated: Whether text was cut to fit.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray
    branch_ids: np.ndarray
    is_picture: np.ndarray
    num_pictures: int
    truncated: bool


# The role of a token. PLAIN covers the template, and the text of questions.
PLAIN = 0
ANSWER = 1
PICTURE = 2


class _Writer:
    """Collects the ids and roles of tokens.

    Text is pending until a special token or a picture follows, and is then tokenized as a whole.

    Attributes:
      ids: Token ids so far.
      roles: The role of each token.
    """

    def __init__(self, encoder: TextEncoder, chat: ChatFormat):
        self.ids: list[int] = []
        self.roles: list[int] = []
        self._encoder = encoder
        self._chat = chat
        self._template = TEMPLATES[chat.template]
        self._pending = ""
        self._answer_start: int | None = None  # index in the pending text
        self._answer_role = ANSWER  # of the answer that begins there
        self._add(encoder.begin, PLAIN)

    def conversation(self, turns: Turns, system: str = "", unlearnt: Sequence[int] = ()) -> None:
        """Writes all turns; of a prompt, up to the place where the model's answer begins.

        A system text replaces that of the template, unless the template writes no questions either.
        Answers of the turns `unlearnt` count as plain text. Nothing follows the last answer, so the
        template's `after_answer` is not written after it.
        """
        template = self._template
        text = (system if template.questions else "") or template.system
        if text:
            self._template_text(template.before_system)
            self._pending += text
            self._template_text(template.after_system)
        for number, (question, answer) in enumerate(turns):
            if number:
                self._template_text(template.after_answer)
            self._template_text(template.user)
            self._question(question)
            self._template_text(template.assistant)
            if answer is not None:
                self._answer(answer, PLAIN if number in unlearnt else ANSWER)
        self._flush()

    def _add(self, ids: Sequence[int], role: int) -> None:
        self.ids += ids
        self.roles += [role] * len(ids)

    def _flush(self) -> None:
        """Tokenizes the pending text. Tokens ending after `_answer_start` have `_answer_role`."""
        if not self._pending:
            return
        at_beginning = len(self.ids) == len(self._encoder.begin)
        encoder = self._encoder.first if at_beginning else self._encoder.later
        encoding = encoder.encode(self._pending, add_special_tokens=False)
        plain = len(encoding.ids)
        if self._answer_start is not None:
            ends = [end for _, end in encoding.offsets]
            plain = bisect.bisect_right(ends, self._answer_start)
        self._pending = ""
        self._answer_start = None
        self._add(encoding.ids[:plain], PLAIN)
        self._add(encoding.ids[plain:], self._answer_role)

    def _special(self, ids: Sequence[int], role: int) -> None:
        self._flush()
        self._add(ids, role)

    def _template_text(self, text: str) -> None:
        """Writes text of the template, in which special tokens count as such."""
        words, *rest = SPECIAL.split(text)
        self._pending += words
        for token, words in zip(rest[::2], rest[1::2]):
            self._special([self._encoder.special_id(token)], PLAIN)
            self._pending += words

    def _question(self, text: str) -> None:
        pieces = text.split(MARKER)
        if not self._template.questions:
            pieces = [""] * len(pieces)
        self._pending += pieces[0]
        for piece in pieces[1:]:
            picture = [self._chat.image_token_id] * self._chat.features_per_picture
            self._special(picture, PICTURE)
            self._pending += piece

    def _answer(self, text: str, role: int) -> None:
        self._answer_start = len(self._pending)
        self._answer_role = role
        self._pending += self._template.gap + text
        self._special([self._chat.end_token_id], role)


def marked(text: str, pictures: int) -> str:
    """Returns a question with a marker for each of its pictures.

    A question without any marker gets them at its beginning, each on a line of its own.

    Raises:
      ValueError: If the question has markers, but another number of them.
    """
    markers = text.count(MARKER)
    if markers not in (0, pictures):
        raise ValueError(
            f"question {text!r} has {markers} picture markers, expected {pictures}, one for each "
            "picture (or none, which puts the pictures first)."
        )
    return text if markers else (MARKER + "\n") * pictures + text


def _encode(
    turns: Turns,
    encoder: TextEncoder,
    chat: ChatFormat,
    system: str = "",
    unlearnt: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids i32[S], roles i32[S]); arguments as for `_Writer.conversation`."""
    writer = _Writer(encoder, chat)
    writer.conversation(turns, system, unlearnt)
    return np.array(writer.ids, np.int32), np.array(writer.roles, np.int32)


def tokenize_prompt(
    turns: Turns, encoder: TextEncoder, chat: ChatFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes a conversation up to the point where the model answers.

    Args:
      turns: (question, answer) of each turn. The last answer is None.
      encoder: From `text_encoder`.
      chat: The text format.
    Returns:
      (tokens i32[S], is_picture bool[S]).
    """
    ids, roles = _encode(turns, encoder, chat)
    return ids, roles == PICTURE


def tokenize(record: Record, encoder: TextEncoder, chat: ChatFormat, max_length: int) -> Tokens:
    """Turns a record into tokens and their targets.

    A preference pair becomes a shared prefix (branch 0), the chosen answer (branch 1) and the
    rejected answer (branch 2). What does not fit is cut from the end of the text, but a picture is
    kept whole or removed. The last token of a sample occurs only as a target.

    Args:
      record: As returned by its source, which has checked it.
      encoder: From `text_encoder`.
      chat: The text format.
      max_length: Largest number of positions (S).
    Raises:
      BadSample: If no token of an answer fits, or what fits of a pair's answers is the same.
    """
    make = _pair if record.is_pair else _chat
    tokens = make(record, encoder, chat, max_length)
    if not tokens.loss_weights.any():
        raise BadSample(f"no answer is left within {max_length} positions")
    return tokens


def _chat(record: Record, encoder: TextEncoder, chat: ChatFormat, max_length: int) -> Tokens:
    ids, roles = _encode(record.turns, encoder, chat, record.system, record.unlearnt)
    length = min(len(ids) - 1, max_length)
    # A picture that was cut in two is removed altogether.
    picture_tokens = int(np.count_nonzero(roles[:length] == PICTURE))
    length -= picture_tokens % chat.features_per_picture
    return Tokens(
        tokens=ids[:length],
        targets=ids[1 : length + 1],
        loss_weights=(roles[1 : length + 1] == ANSWER).astype(np.float32),
        positions=np.arange(length, dtype=np.int32),
        branch_ids=np.zeros(length, np.int32),
        is_picture=roles[:length] == PICTURE,
        num_pictures=picture_tokens // chat.features_per_picture,
        truncated=length < len(ids) - 1,
    )


def _pair(record: Record, encoder: TextEncoder, chat: ChatFormat, max_length: int) -> Tokens:
    """Tokenizes a preference pair.

    A position has a single target. So each branch starts with its own copy of the prompt's last
    token, which predicts the first token of the branch's answer.
    """
    *earlier, (question, chosen) = record.turns
    system = record.system
    chosen_ids, roles = _encode((*earlier, (question, chosen)), encoder, chat, system)
    rejected_ids, _ = _encode((*earlier, (question, record.rejected)), encoder, chat, system)
    not_answer = np.flatnonzero(roles != ANSWER)
    if not not_answer.size or roles[not_answer[-1]] == PICTURE:
        raise BadSample(
            f"a pair needs text before its answers; template {chat.template!r} leaves none"
        )
    prompt_end = int(not_answer[-1])  # index of the prompt's last token; length of the prefix
    lengths = np.array([len(chosen_ids) - 1 - prompt_end, len(rejected_ids) - 1 - prompt_end])
    # The branches share the free positions evenly; one may also use what the other does not need.
    free = max_length - prompt_end
    kept = np.minimum(lengths, max(free // 2, free - lengths.min()))
    if kept.min() <= 0:
        raise BadSample(f"no answer is left within {max_length} positions")
    prefix = chosen_ids[: prompt_end + 1]
    branches = [
        ids[prompt_end : prompt_end + length + 1]
        for ids, length in zip((chosen_ids, rejected_ids), kept)
    ]
    ends = [prompt_end, *(prompt_end + kept)]
    if np.array_equal(branches[0], branches[1]):
        raise BadSample(
            f"chosen and rejected are the same tokens: {kept[0]} are left of each within "
            f"{max_length} positions"
        )
    starts = [0, prompt_end, prompt_end]
    positions = [np.arange(start, end, dtype=np.int32) for start, end in zip(starts, ends)]
    no_pictures = np.zeros(kept.sum(), bool)
    is_picture = np.concatenate([roles[:prompt_end] == PICTURE, no_pictures])
    return Tokens(
        tokens=np.concatenate([prefix[:-1], *(ids[:-1] for ids in branches)]),
        targets=np.concatenate([prefix[1:], *(ids[1:] for ids in branches)]),
        loss_weights=np.repeat(np.array([0, 1], np.float32), [prompt_end, kept.sum()]),
        positions=np.concatenate(positions),
        branch_ids=np.repeat(np.arange(3, dtype=np.int32), [prompt_end, *kept]),
        is_picture=is_picture,
        num_pictures=int(np.count_nonzero(is_picture)) // chat.features_per_picture,
        truncated=bool((kept < lengths).any()),
    )
