"""Chat messages as transformers has them: {"role", "content"}, the content a string or a list of parts, and the pictures they show.

In a string `<image>` marks a picture. A part is {"type": "text", "text"} or {"type": "image"}, which may carry its picture as "image" or
"path"; `<image>` in a text part is text.
"""

from collections.abc import Callable, Sequence

from jinja2 import TemplateError

from mod_jax.config import require
from mod_jax.data.sources.record import MARKER

PICTURE, WORD = {"type": "image"}, "probe"


def pictures_shown(messages: Sequence[dict], images: Sequence = ()) -> list:
    """The pictures of a conversation, in the order in which it shows them.

    Args:
      messages: the conversation.
      images: those that no part carries.
    Raises:
      ConfigError: if there are more or fewer of them than the conversation shows, or a part is of another type.
    """
    places = [picture for message in messages for picture in _places(message["content"])]
    empty, rest = sum(picture is None for picture in places), iter(images)
    require(
        empty == len(images),
        "images",
        f"{len(images)} pictures",
        f"{empty}, as many as the conversation shows and does not carry itself",
    )
    return [next(rest) if picture is None else picture for picture in places]


def _places(content: str | Sequence[dict]) -> list:
    """The picture of each place for one, None where it is not carried."""
    if isinstance(content, str):
        return [None] * content.count(MARKER)
    for part in content:
        require(part["type"] in ("text", "image"), "content", part, "parts of type text or image")
    return [part.get("image", part.get("path")) for part in content if part["type"] == "image"]


def for_template(messages: Sequence[dict], render: Callable[[list[dict]], str]) -> list[dict]:
    """The messages with contents in a form that a chat template shows: some show strings only, some parts only.

    Args:
      messages: the conversation.
      render: messages -> text, by the template.
    """
    strings, parts = (
        _shows(render, content)
        for content in (f"{MARKER}\n{WORD}", [PICTURE, {"type": "text", "text": WORD}])
    )

    def form(content):
        if isinstance(content, str):
            return _as_parts(content) if parts and not strings else content
        bare = [
            PICTURE
            if part["type"] == "image"
            else {"type": "text", "text": part["text"].replace(MARKER, "< image>")}
            for part in content
        ]
        return bare if parts else "\n".join(part.get("text", MARKER) for part in bare)

    return [message | {"content": form(message["content"])} for message in messages]


def _shows(render, content) -> bool:
    """Whether a message's picture and word come out: of a form that a template does not know, some drop all, some write Python."""
    try:
        text = render([{"role": "user", "content": content}])
    except (TemplateError, TypeError):
        return False
    return text.count(MARKER) == 1 and WORD in text


def _as_parts(content: str) -> list[dict]:
    first, *others = (
        {"type": "text", "text": piece.strip("\n")} for piece in content.split(MARKER)
    )
    parts = [first, *(part for text in others for part in (PICTURE, text))]
    return [part for part in parts if part.get("text", MARKER)]
