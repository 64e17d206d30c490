"""Reads the forms in which data sets write conversations and preference pairs.

The readers turn an entry, a dict from whatever file format, into a record. A message is LLaVA's
{from: human | gpt | system, value} or {role: user | assistant | system, content}; content is a
text, or a list of parts of type text and image.

- chat: {conversations | messages: [message, ...]}
- pair: {chosen: answer, rejected: answer}, where an answer is a text, a message, or messages. They
  hold the whole conversation, or only what follows {prompt | question | conversations | messages},
  a text or messages. `rejected_response` alone rejects the last answer of `messages`.

A text for the whole conversation stands under `system`, `system_prompt` or in a first message.
`loss: false`, or a weight of 0, at a message keeps its answer from being learnt. `keys` says what
other keys mean.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mod_jax.data import MARKER
from mod_jax.data.sources import keys
from mod_jax.data.sources.picture_fields import names_nothing, read_picture, values_of
from mod_jax.data.sources.pictures import Pictures
from mod_jax.data.sources.record import BadSample, Picture, Record, Turns, quoted

Reader = Callable[[Mapping[str, Any], str, Pictures | None], Record]  # read_chat or read_pair
SPEAKERS = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "system": "system",
}


class _Message(NamedTuple):
    """A message in the form that all others are turned into.

    Attributes:
      speaker: "human", "gpt" or "system".
      text: The text, without white space around it.
      learnt: Whether it is learnt if it is an answer.
      pictures: Values of pictures that its parts carry.
      unused: Keys that carry nothing.
    """

    speaker: str
    text: str
    learnt: bool = True
    pictures: tuple = ()
    unused: tuple[str, ...] = ()


class _Conversation(NamedTuple):
    """System text, turns, and the numbers of the turns that are not learnt."""

    system: str
    turns: Turns
    unlearnt: tuple[int, ...]


def read_chat(entry: Mapping[str, Any], name: str, place: Pictures | None) -> Record:
    """Reads a chat.

    Args:
      entry: The chat.
      name: Id of the record.
      place: Where its pictures are found by name. None leaves them out.
    Raises:
      BadSample: If the entry is not a chat, or carries what cannot be used.
    """
    pictured = place is None or bool(values_of(entry))
    unused = keys.unused(entry, keys.OF_CHAT, pictured)
    messages = _messages(_need(entry, keys.CHATS, "a chat"), "human", pictured)
    system, turns, unlearnt = _conversation(entry, messages)
    images = _pictures(entry, messages, place)
    return Record(name, images, turns, "", system, unlearnt, _all_unused(unused, messages))


def read_pair(entry: Mapping[str, Any], name: str, place: Pictures | None) -> Record:
    """Reads a preference pair.

    Args:
      entry: The pair.
      name: Id of the record.
      place: Where its pictures are found by name. None leaves them out. If a prompt is a text
        without markers, one marker per picture is put in front of it, each on a line of its own,
        as the reference code does.
    Raises:
      BadSample: If the entry is not a pair, an answer is empty, chosen and rejected differ in more
        than their last answer, or it carries what cannot be used.
    """
    pictured = place is None or bool(values_of(entry))
    unused = keys.unused(entry, keys.OF_PAIR, pictured)
    chosen, rejected = _both_sides(entry, pictured)
    images = _pictures(entry, chosen, place)
    prompt = keys.first_of(entry, keys.PROMPTS)
    if isinstance(prompt, str) and place is not None and MARKER not in prompt:
        if names_nothing(entry):
            raise BadSample("image is empty, and no marker in the question says that it may be")
        chosen, rejected = (_with_markers(side, len(images)) for side in (chosen, rejected))
    system, turns, unlearnt = _conversation(entry, chosen)
    other_system, other_turns, other_unlearnt = _conversation(entry, rejected)
    if not turns or not other_turns or not turns[-1][1] or not other_turns[-1][1]:
        raise BadSample("chosen or rejected without an answer text")
    _check_same_before_answers([("", system), *turns], [("", other_system), *other_turns])
    if len(turns) - 1 in (*unlearnt, *other_unlearnt):
        raise BadSample("no answer is learnt")
    unused = _all_unused(unused, [*chosen, *rejected])
    return Record(name, images, turns, other_turns[-1][1], system, (), unused)


def _need(entry: Mapping[str, Any], names: Sequence[str], what: str) -> Any:
    value = keys.first_of(entry, tuple(names))
    if value is None:
        expected = " or ".join(names)
        raise BadSample(f"{what} without {expected}: it has {keys.listed(entry)}")
    return value


def _both_sides(entry: Mapping[str, Any], pictured: bool) -> tuple[list[_Message], list[_Message]]:
    """Returns the two whole conversations of a pair."""
    rejected = _messages(_need(entry, keys.REJECTED, "a pair"), "gpt", pictured)
    prompt_value = keys.first_of(entry, keys.PROMPTS)
    prompt = [] if prompt_value is None else _messages(prompt_value, "human", pictured)
    answered = bool(prompt) and prompt[-1].speaker == "gpt" and entry.get("chosen") is None
    if answered:
        chosen = [prompt.pop()]
    else:
        chosen = _messages(_need(entry, keys.CHOSEN, "a pair"), "gpt", pictured)
    for side in (chosen, rejected):
        if not prompt and side and side[0].speaker == "gpt":
            raise BadSample(
                f"a pair without {' or '.join(keys.PROMPTS)}: it has {keys.listed(entry)}"
            )
    return _whole(prompt, chosen), _whole(prompt, rejected)


def _whole(prompt: list[_Message], side: list[_Message]) -> list[_Message]:
    """Puts the prompt in front of an answer, unless that begins with it."""
    if not prompt or not side or side[0].speaker == "gpt":
        return prompt + side
    spoken = [message for message in side if message.speaker != "system"]
    asked = [message for message in prompt if message.speaker != "system"]
    if [m[:2] for m in spoken[: len(asked)]] != [m[:2] for m in asked]:
        raise BadSample(
            f"the prompt and the beginning of an answer's conversation differ: "
            f"{quoted(asked[0].text)}, {quoted(spoken[0].text if spoken else '')}"
        )
    has_system = side[0].speaker == "system" or prompt[0].speaker != "system"
    return side if has_system else [prompt[0], *side]


def _messages(value: Any, speaker: str, pictured: bool) -> list[_Message]:
    """Reads a text of this speaker, a message, or a list of messages; see `keys.unused`."""
    if isinstance(value, str):
        return [_Message(speaker, value.strip())]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise BadSample("conversation is not a list of {from, value}")
    return [_message(message, pictured) for message in value]


def _message(message: Any, pictured: bool) -> _Message:
    if not isinstance(message, Mapping):
        raise BadSample("conversation is not a list of {from, value}")
    role = keys.first_of(message, keys.SPEAKER)
    content = keys.first_of(message, keys.TEXT)
    if role is None or not isinstance(content, (str, list, tuple)):
        raise BadSample("conversation is not a list of {from, value}")
    if not isinstance(role, str) or role not in SPEAKERS:
        raise BadSample(f"unknown speaker {quoted(role)}, expected human or gpt")
    speaker = SPEAKERS[role]
    text, pictures = (content, ()) if isinstance(content, str) else _parts(content)
    unused = keys.unused(message, keys.OF_MESSAGE, pictured or bool(pictures))
    learnt = _is_learnt(message, speaker)
    return _Message(speaker, text.strip(), learnt, pictures, unused)


def _parts(parts: Sequence) -> tuple[str, tuple]:
    """Returns the text of a content in parts, which line breaks join, and the pictures in it."""
    texts = []
    pictures = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append(MARKER)
            named = (part[key] for key in ("image", "path", "url", "image_url") if part.get(key))
            for value in itertools.islice(named, 1):
                is_url = isinstance(value, Mapping) and "url" in value
                pictures.append(value["url"] if is_url else value)
        else:
            raise BadSample(f"part {quoted(part)} of a content: expected a text or an image")
    return "\n".join(texts), tuple(pictures)


def _is_learnt(message: Mapping[str, Any], speaker: str) -> bool:
    """Reads the keys that say whether an answer is learnt."""
    flags = {key: message[key] for key in keys.LEARNT if message.get(key) is not None}
    for key, flag in flags.items():
        if not isinstance(flag, (bool, int, float)) or flag not in (0, 1):
            raise BadSample(f"{key} of a turn is {quoted(flag)}: expected 0 or 1")
        if flag and speaker != "gpt" and key in ("loss", "train"):
            raise BadSample(f"{key} of a question is {quoted(flag)}: only answers are learnt")
    return all(flags.values())


def _conversation(entry: Mapping[str, Any], messages: Sequence[_Message]) -> _Conversation:
    """Splits messages into the system text and turns, with the system text of the entry."""
    system = keys.first_of(entry, keys.SYSTEM) or ""
    if not isinstance(system, str):
        raise BadSample(f"system text {quoted(system)}: expected a text")
    system = system.strip()
    if messages and messages[0].speaker == "system":
        own, *messages = messages
        if system and own.text and system != own.text:
            raise BadSample(f"two system texts: {quoted(system)}, {quoted(own.text)}")
        system = own.text or system
    speakers = [message.speaker for message in messages]
    if "system" in speakers:
        raise BadSample("a system text that does not stand first")
    if speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise BadSample("human and gpt do not take turns")
    texts = [message.text for message in messages]
    answers = messages[1::2]
    unlearnt = tuple(number for number, answer in enumerate(answers) if not answer.learnt)
    return _Conversation(system, tuple(zip(texts[::2], texts[1::2])), unlearnt)


def _check_same_before_answers(
    chosen: list[tuple[str, str]], rejected: list[tuple[str, str]]
) -> None:
    """Refuses two sides that differ before their last answers, and quotes what differs.

    A side is its system text, as an answer to nothing, and its turns.
    """
    before = [text for turn in chosen for text in turn][:-1]
    other = [text for turn in rejected for text in turn][:-1]
    if before == other:
        return
    if len(before) != len(other):
        counts = f"{len(chosen) - 1} and {len(rejected) - 1}"
        raise BadSample(f"chosen and rejected have different human turns: {counts} of them")
    place, texts = next(
        (place, texts) for place, texts in enumerate(zip(before, other)) if texts[0] != texts[1]
    )
    what = "human turns" if place % 2 == 0 else "earlier answers" if place > 1 else "system texts"
    first, second = map(quoted, texts)
    raise BadSample(f"chosen and rejected have different {what}: {first} and {second}")


def _with_markers(messages: list[_Message], pictures: int) -> list[_Message]:
    """Puts a marker per picture in front of the first question."""
    number = [message.speaker for message in messages].index("human")
    asked = messages[number]._replace(text=(MARKER + "\n") * pictures + messages[number].text)
    return [*messages[:number], asked, *messages[number + 1 :]]


def _pictures(
    entry: Mapping[str, Any], messages: Sequence[_Message], place: Pictures | None
) -> tuple[Picture, ...]:
    """Reads the pictures that the entry names, or those that its messages carry."""
    if place is None:
        return ()
    values = values_of(entry)
    carried = [value for message in messages for value in message.pictures]
    if values and carried and values != carried:
        raise BadSample("pictures both in the messages and beside them: expected one of these")
    return tuple(read_picture(value, place) for value in values or carried)


def _all_unused(unused: tuple[str, ...], messages: Sequence[_Message]) -> tuple[str, ...]:
    of_messages = {f"{key} of a message" for message in messages for key in message.unused}
    return (*unused, *sorted(of_messages))
