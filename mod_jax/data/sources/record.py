"""The record that every source returns, and the checks that every record must pass."""

import dataclasses
import pathlib
import re

from mod_jax.data import MARKER

Picture = bytes | pathlib.Path  # an encoded picture, or its file
Turns = tuple[tuple[str, str], ...]  # (question, answer) of each
MOST_QUOTED = 80  # characters of what a user wrote that a message repeats
# Placeholders of what is not supported. A tag that is closed is HTML that the text is about.
LEFT_OVER = re.compile(r"<\|?(video|audio|speech|sound)(_pad|_?\d+)?\|?>", re.IGNORECASE)


class BadSample(ValueError):
    """A record that cannot be used; the message is the reason.

    The pipeline skips such records, counts them and reports them by name.
    """


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation about any number of pictures, or a preference pair.

    Attributes:
      id: Name of the record in its source.
      images: The pictures as encoded bytes or paths, in the order of the `<image>` markers.
      turns: (question, answer) of each turn. Markers occur in questions only. The last answer of a
        preference pair is the chosen one.
      rejected: The rejected answer to the last question of a preference pair; empty for a plain
        conversation.
      system: The conversation's own system text; empty if it has that of the template.
      unlearnt: Numbers of the turns whose answers are context only, not learnt.
      unused: Keys of the entry that carry nothing for training. They do not make records differ.
    """

    id: str
    images: tuple[Picture, ...]
    turns: Turns
    rejected: str = ""
    system: str = ""
    unlearnt: tuple[int, ...] = ()
    unused: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def is_pair(self) -> bool:
        """Whether this is a preference pair."""
        return bool(self.rejected)


def check(record: Record) -> Record:
    """Returns the record unchanged if training can use it as it is.

    Its markers match its pictures, every turn has an answer, one of them is learnt, there is
    something to prefer in a pair, and no placeholder of a video or a sound is left in a text.

    Raises:
      BadSample: Otherwise.
    """
    questions = [question for question, _ in record.turns]
    answers = [answer for _, answer in record.turns]
    markers = sum(question.count(MARKER) for question in questions)
    pictures = len(record.images)
    if not answers:
        raise BadSample("no turns")
    if not all(answers):
        raise BadSample("question without an answer text")
    if any(MARKER in answer for answer in (*answers, record.rejected)):
        raise BadSample("picture token in an answer")
    if MARKER in record.system:
        raise BadSample("picture token in the system text")
    if markers > pictures:
        raise BadSample(f"picture token without picture: {markers} tokens, {pictures} pictures")
    if markers < pictures:
        raise BadSample(f"picture without picture token: {markers} tokens, {pictures} pictures")
    if len(record.unlearnt) == len(answers):
        raise BadSample("no answer is learnt")
    if record.is_pair and _without_space(answers[-1]) == _without_space(record.rejected):
        raise BadSample(f"chosen and rejected are the same text: {quoted(record.rejected)}")
    for text in (record.system, *questions, *answers, record.rejected):
        _check_text(text)
    return record


def _check_text(text: str) -> None:
    found = LEFT_OVER.search(text)
    if found and f"</{found[1].lower()}>" not in text.lower():
        raise BadSample(f"{found[0]} in a text: only pictures are supported")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = error.object[error.start]
        raise BadSample(f"unpaired surrogate in the text ({surrogate!a})") from None


def _without_space(text: str) -> str:
    return "".join(text.split())


def without_pictures(record: Record) -> Record:
    """Returns the record without its pictures and their markers."""
    turns = tuple(
        (question.replace(MARKER, "").strip(), answer) for question, answer in record.turns
    )
    return dataclasses.replace(record, images=(), turns=turns)


def printable(name) -> str:
    """Returns `name` as text that can be written as UTF-8: unpaired surrogates are escaped."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def quoted(value: object) -> str:
    """Returns what a user wrote as a message quotes it: in one line of at most MOST_QUOTED.

    The middle of a longer text is left out, as a path is told by its end.
    """
    return f"{shortened(value)!r}" if isinstance(value, str) else shortened(repr(value))


def shortened(text: str) -> str:
    """Returns a text in at most MOST_QUOTED characters; "..." stands for its middle."""
    if len(text) <= MOST_QUOTED:
        return text
    kept = (MOST_QUOTED - 3) // 2
    return f"{text[:kept]}...{text[-kept:]}"
