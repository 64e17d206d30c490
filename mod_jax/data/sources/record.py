"""What a source gives: a conversation about pictures, or a preference pair; and when it cannot be used."""

import dataclasses
import pathlib

MARKER = "<image>"


class BadSample(ValueError):
    """A record that cannot be used. The pipeline skips, counts and names it; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation about any number of pictures, or a preference pair.

    Attributes:
      id: its name in its source.
      images: the pictures, encoded bytes or paths, in the order of the `<image>` markers.
      turns: (question, answer) each; markers stand in questions only. Of a pair the last answer is the chosen one.
      rejected: the other answer to the last question of a pair; empty for a plain conversation.
    """

    id: str
    images: tuple[bytes | pathlib.Path, ...]
    turns: tuple[tuple[str, str], ...]
    rejected: str = ""


def check(record: Record) -> Record:
    """The record itself if markers and pictures agree and every turn has its text.

    Raises:
      BadSample: otherwise.
    """
    questions, answers = zip(*record.turns) if record.turns else ((), ())
    markers = sum(question.count(MARKER) for question in questions)
    if not answers:
        raise BadSample("no turns")
    if not all(answers):
        raise BadSample("question without an answer text")
    if any(MARKER in answer for answer in (*answers, record.rejected)):
        raise BadSample("picture token in an answer")
    if markers > len(record.images):
        raise BadSample(
            f"picture token without picture: {markers} tokens, {len(record.images)} pictures"
        )
    if markers < len(record.images):
        raise BadSample(
            f"picture without picture token: {markers} tokens, {len(record.images)} pictures"
        )
    try:
        "".join((*questions, *answers, record.rejected)).encode()
    except UnicodeEncodeError as error:
        raise BadSample(
            f"half a surrogate pair in the text ({error.object[error.start]!a})"
        ) from None
    return record


def without_pictures(record: Record) -> Record:
    """The texts of a record alone."""
    turns = tuple(
        (question.replace(MARKER, "").strip(), answer) for question, answer in record.turns
    )
    return dataclasses.replace(record, images=(), turns=turns)


def printable(name) -> str:
    """A record's name as text that any file or terminal takes."""
    return str(name).encode("utf-8", "backslashreplace").decode()
