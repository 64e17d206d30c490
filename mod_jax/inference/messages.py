"""Chat messages in the form of transformers, and the pictures that they show.

A message is {"role", "content"}. Its content is a string, in which `<image>` marks a picture, or a
list of parts. A part is {"type": "text", "text"}, in which `<image>` is just text, or {"type":
"image"}, which may carry its picture as "image" (a picture), "path", "url" or "base64", or OpenAI's
{"type": "image_url", "image_url": {"url"}}. A URL is data:, file:, http: or https:, or a path.
"""

import base64
import binascii
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from mod_jax.config import ConfigError, require
from mod_jax.data.sources.record import MARKER

Message = dict[str, Any]
Content = str | Sequence[dict[str, Any]]

PICTURE = {"type": "image"}
# Types of a part that is a picture.
PICTURES = ("image", "image_url")
# What a chat template raises: itself, or since it cannot show the messages that it gets.
TEMPLATE_ERRORS = (TemplateError, TypeError, LookupError, AttributeError)
# Text of the message that `_shows` renders.
WORD = "probe"
MOST_CHARACTERS = 80  # of what a user wrote, in a message
TIMEOUT = 60  # seconds


def check_messages(messages: Sequence[Message]) -> None:
    """Checks that a conversation has the form that this module describes.

    Raises:
      ConfigError: Naming the first message, or part of one, that has not.
    """
    expect(len(messages) > 0, "messages", messages, "at least one message")
    for number, message in enumerate(messages):
        key = f"messages[{number}]"
        is_message = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        expect(is_message, key, message, 'an object with "role" and "content"')
        content: Any = message.get("content")
        is_content = isinstance(content, (str, list, tuple))
        expect(is_content, f"{key}: content", content, "a text, or a list of parts")
        if not isinstance(content, str):
            for place, part in enumerate(content):
                _check_part(f"{key}: content[{place}]", part)


def _check_part(key: str, part: object) -> None:
    if not isinstance(part, Mapping) or part.get("type") not in ("text", *PICTURES):
        kinds = f"parts of type text or image (also {', '.join(PICTURES[1:])})"
        raise ConfigError(f"{key} = {short(part)}: expected {kinds}.")
    if part["type"] == "text":
        expect(isinstance(part.get("text"), str), key, part, 'a "text"')
    if part["type"] == "image_url":
        expect(bool(_url_of(part)), key, part, 'a picture as {"image_url": {"url": ...}}')


def expect(ok: bool, key: str, value: object, expected: str) -> None:
    """Raises ConfigError about what a user wrote, which it quotes briefly, unless `ok`."""
    if not ok:
        raise ConfigError(f"{key} = {short(value)}: expected {expected}.")


def short(value: object) -> str:
    """Returns what a user wrote as a message quotes it."""
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def pictures_shown(messages: Sequence[Message], images: Sequence = ()) -> list:
    """Returns the pictures of a conversation, in the order in which it shows them.

    Args:
      messages: The conversation.
      images: The pictures that no part carries.

    Raises:
      ConfigError: If there are more or fewer of them than the conversation shows, the conversation
        is malformed (`check_messages`), or a URL cannot be read.
    """
    check_messages(messages)
    places = [picture for message in messages for picture in _places(message["content"])]
    missing = sum(picture is None for picture in places)
    require(
        missing == len(images),
        "images",
        f"{len(images)} pictures",
        f"{missing}, the number of pictures that the conversation shows but does not carry",
    )
    remaining = iter(images)
    return [next(remaining) if picture is None else picture for picture in places]


def _places(content: Content) -> list:
    """The picture of each place for one; None if the conversation does not carry it."""
    if isinstance(content, str):
        return [None] * content.count(MARKER)
    return [_carried(part) for part in content if part["type"] in PICTURES]


def _carried(part: Mapping[str, Any]) -> Any:
    """The picture that a part carries; None if it carries none."""
    for key in ("image", "path"):
        picture = part.get(key)
        if picture is not None:
            return _read_url(picture) if isinstance(picture, str) else picture
    url = _url_of(part)
    if url:
        return _read_url(url)
    return None if part.get("base64") is None else _decoded(part["base64"])


def _url_of(part: Mapping[str, Any]) -> str | None:
    """The URL of a part, in transformers' form or in OpenAI's; None if it has none."""
    url = part.get("image_url") or part.get("url")
    if isinstance(url, Mapping):
        url = url.get("url")
    expect(url is None or isinstance(url, str), "url of a picture", url, "a text")
    return url or None


def _read_url(url: str) -> bytes | str:
    """The encoded picture behind a URL, or its path.

    Raises:
      ConfigError: If it cannot be read.
    """
    scheme = urllib.parse.urlsplit(url[:MOST_CHARACTERS]).scheme.lower()
    if scheme == "data":
        header, _, data = url.partition(",")
        is_base64 = header.lower().endswith(";base64")
        return _decoded(data) if is_base64 else urllib.parse.unquote_to_bytes(data)
    if scheme == "file":
        return urllib.request.url2pathname(urllib.parse.urlsplit(url).path)
    if scheme not in ("http", "https"):
        return url
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return answer.read()
    except (OSError, ValueError) as error:  # URLError is an OSError
        reason = " ".join(str(error).split())
        raise ConfigError(f"url = {short(url)}: expected a picture ({reason}).") from error


def _decoded(text: object) -> bytes:
    """The bytes of a picture in base64."""
    try:
        return base64.b64decode(str(text).partition("base64,")[2] or str(text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"picture = {short(text)}: expected base64 ({error}).") from error


def for_template(
    messages: Sequence[Message], render: Callable[[list[Message]], str]
) -> list[Message]:
    """Brings the contents of messages to a form that a chat template can show.

    Some templates can only show strings, others only parts.

    Args:
      messages: The conversation.
      render: Function that renders messages by the template.
    """
    shows_strings = _shows(render, f"{MARKER}\n{WORD}")
    shows_parts = _shows(render, [PICTURE, {"type": "text", "text": WORD}])

    def convert(content: Content) -> Content:
        if isinstance(content, str):
            return _as_parts(content) if shows_parts and not shows_strings else content
        # Pictures are dropped from the parts, and markers in text are broken up.
        parts = [
            PICTURE
            if part["type"] in PICTURES
            else {"type": "text", "text": part["text"].replace(MARKER, "< image>")}
            for part in content
        ]
        return parts if shows_parts else "\n".join(part.get("text", MARKER) for part in parts)

    return [message | {"content": convert(message["content"])} for message in messages]


def _shows(render: Callable[[list[Message]], str], content: Content) -> bool:
    """Whether a template renders both the picture and the text of a message.

    With a form of content that they do not know, some templates drop all of it, and others write
    Python's representation of it.
    """
    try:
        text = render([{"role": "user", "content": content}])
    except TEMPLATE_ERRORS:
        return False
    return text.count(MARKER) == 1 and WORD in text


def _as_parts(content: str) -> list[dict[str, Any]]:
    first, *others = content.split(MARKER)
    parts = [_text_part(first)]
    for text in others:
        parts += [PICTURE, _text_part(text)]
    return [part for part in parts if part.get("text", MARKER)]  # drops empty text


def _text_part(text: str) -> dict[str, Any]:
    """A part without the line breaks at its ends, which the template puts between parts."""
    return {"type": "text", "text": text.strip("\n")}
