"""Reads the forms in which LLaVA's family of data sets writes conversations and preference pairs.

The readers turn a dict of texts, from whatever file format it comes, into a record:

- chat: {conversations: [{from: human | gpt, value}, ...]}
- pair: {chosen: [{from, value}, ...], rejected: [...]}, which differ in the last answer only
- plain pair: {question, chosen, rejected}, three texts (the form of RLAIF-V)
"""

from collections.abc import Callable
from typing import Any

from mod_jax.data import MARKER
from mod_jax.data.sources.record import BadSample, Picture, Record, Turns

Reader = Callable[[dict, str, tuple[Picture, ...]], Record]  # read_chat or read_pair


def parse_turns(messages: Any) -> Turns:
    """Returns the (question, answer) pairs of a list of LLaVA messages {from: human | gpt, value}.

    Leading and trailing white space of each text is dropped.

    Raises:
      BadSample: If `messages` is not a list of such messages, or human and gpt do not alternate.
    """
    try:
        roles = [message["from"] for message in messages]
        texts = [message["value"].strip() for message in messages]
    except (TypeError, KeyError, AttributeError):
        raise BadSample("conversation is not a list of {from, value}") from None
    unknown = [role for role in roles if role not in ("human", "gpt")]
    if unknown:
        raise BadSample(f"unknown speaker {unknown[0]!r}, expected human or gpt")
    if roles != ["human", "gpt"] * (len(roles) // 2):
        raise BadSample("human and gpt do not take turns")
    return tuple(zip(texts[::2], texts[1::2]))


def read_chat(entry: dict, name: str, images: tuple[Picture, ...]) -> Record:
    """Reads a chat.

    Args:
      entry: The chat.
      name: Id of the record.
      images: Its pictures.
    Raises:
      BadSample: If the entry is not a chat.
    """
    return Record(name, images, parse_turns(entry.get("conversations")))


def read_pair(entry: dict, name: str, images: tuple[Picture, ...]) -> Record:
    """Reads a pair or a plain pair.

    Args:
      entry: The pair.
      name: Id of the record.
      images: Its pictures. If the question of a plain pair has no markers, one marker per picture
        is put in front of it, each on a line of its own, as the reference code does.
    Raises:
      BadSample: If the entry is not a pair, an answer is empty, or chosen and rejected differ in
        more than their last answer.
    """
    if "question" in entry:
        return _read_plain(entry, name, images)
    chosen = parse_turns(entry.get("chosen"))
    rejected = parse_turns(entry.get("rejected"))
    if not chosen or not rejected or not rejected[-1][1]:
        raise BadSample("chosen or rejected without an answer text")
    if (chosen[:-1], chosen[-1][0]) != (rejected[:-1], rejected[-1][0]):
        raise BadSample("chosen and rejected have different human turns")
    return Record(name, images, chosen, rejected[-1][1])


def _read_plain(entry: dict, name: str, images: tuple[Picture, ...]) -> Record:
    try:
        texts = [entry[key].strip() for key in ("question", "chosen", "rejected")]
    except (KeyError, AttributeError):
        raise BadSample("question, chosen and rejected are not three texts") from None
    question, chosen, rejected = texts
    if not chosen or not rejected:
        raise BadSample("chosen or rejected without an answer text")
    if MARKER not in question:
        question = (MARKER + "\n") * len(images) + question
    return Record(name, images, ((question, chosen),), rejected)
