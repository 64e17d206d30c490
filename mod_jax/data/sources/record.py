"""The record that every source returns, and the checks that every record must pass."""

import dataclasses
import pathlib

from mod_jax.data import MARKER

Picture = bytes | pathlib.Path  # an encoded picture, or its file
Turns = tuple[tuple[str, str], ...]  # (question, answer) of each


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
    """

    id: str
    images: tuple[Picture, ...]
    turns: Turns
    rejected: str = ""

    @property
    def is_pair(self) -> bool:
        """Whether this is a preference pair."""
        return bool(self.rejected)


def check(record: Record) -> Record:
    """Returns the record unchanged if its markers match its pictures and every turn has an answer.

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
    if markers > pictures:
        raise BadSample(f"picture token without picture: {markers} tokens, {pictures} pictures")
    if markers < pictures:
        raise BadSample(f"picture without picture token: {markers} tokens, {pictures} pictures")
    try:
        "".join((*questions, *answers, record.rejected)).encode()
    except UnicodeEncodeError as error:
        surrogate = error.object[error.start]
        raise BadSample(f"unpaired surrogate in the text ({surrogate!a})") from None
    return record


def without_pictures(record: Record) -> Record:
    """Returns the record without its pictures and their markers."""
    turns = tuple(
        (question.replace(MARKER, "").strip(), answer) for question, answer in record.turns
    )
    return dataclasses.replace(record, images=(), turns=turns)


def printable(name) -> str:
    """Returns `name` as text that can be written as UTF-8: unpaired surrogates are escaped."""
    return str(name).encode("utf-8", "backslashreplace").decode()
