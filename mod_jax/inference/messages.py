"""Chat messages in the form of transformers, and the pictures that they show.

A message is {"role", "content"}. Its content is a string, in which `<image>` marks a picture, or a
list of parts. A part is {"type": "text", "text"}, in which `<image>` is just text, or {"type":
"image"}, which may carry its picture as "image" or "path".
"""

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError

from mod_jax.config import require
from mod_jax.data.sources.record import MARKER

Message = dict[str, Any]
Content = str | Sequence[dict[str, Any]]

PICTURE = {"type": "image"}
# Text of the message that `_shows` renders.
WORD = "probe"


def pictures_shown(messages: Sequence[Message], images: Sequence = ()) -> list:
    """Returns the pictures of a conversation, in the order in which it shows them.

    Args:
      messages: The conversation.
      images: The pictures that no part carries.

    Raises:
      ConfigError: If there are more or fewer of them than the conversation shows, or a part is of
        another type.
    """
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
    for part in content:
        require(part["type"] in ("text", "image"), "content", part, "parts of type text or image")
    return [part.get("image", part.get("path")) for part in content if part["type"] == "image"]


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
            if part["type"] == "image"
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
    except (TemplateError, TypeError):
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
