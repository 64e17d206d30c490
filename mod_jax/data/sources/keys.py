"""What the keys of an entry mean to training: which are read, which carry nothing, which cannot be.

A key that is not read is judged by its name and its value. It either carries nothing that training
uses (a score, the name of a source, an empty value), or something without which the record would be
learnt wrongly (a picture under another name, a video, a tool).
"""

import re
from collections.abc import Mapping
from typing import Any

from mod_jax.data.sources.record import BadSample, quoted

PICTURES = ("image", "images")
CHATS = ("conversations", "messages")
PROMPTS = (*CHATS, "prompt", "question")
CHOSEN = ("chosen",)
REJECTED = ("rejected", "rejected_response")
SYSTEM = ("system", "system_prompt", "system_message")
SPEAKER = ("from", "role")
TEXT = ("value", "content")
LEARNT = ("loss", "weight", "train", "loss_weight")  # 0 or false: an answer is not learnt

OF_CHAT = {"id", *PICTURES, *CHATS, *SYSTEM}
OF_PAIR = {*OF_CHAT, *PROMPTS, *CHOSEN, *REJECTED}
OF_MESSAGE = {*SPEAKER, *TEXT, *LEARNT}
_TOOLS = ("tools", "tool_calls", "functions", "function_call", "history")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_PICTURE = re.compile(r"^(image|img|picture|photo|pic)s?|(image|img|picture|photo)s?$|^frames?$")
_OTHER_MEDIA = re.compile(r"^(video|audio|speech|sound)s?|(video|audio)s?$")
_SYSTEM_TEXT = ("system", "sys", "text", "prompt", "prompts", "message", "instruction")
_FILE = re.compile(
    r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif|mp4|webm|mkv|avi|mov|wav|mp3|flac)$", re.IGNORECASE
)
# "image_width" describes a picture; it does not name one.
_DESCRIBES = frozenset(
    [
        "id",
        "ids",
        "idx",
        "index",
        "width",
        "height",
        "size",
        "sizes",
        "hash",
        "md5",
        "sha256",
        "count",
        "number",
        "source",
        "sources",
        "caption",
        "captions",
        "description",
        "descriptions",
        "score",
        "scores",
        "type",
        "types",
        "format",
        "tokens",
        "category",
        "class",
        "label",
        "labels",
        "quality",
        "license",
        "split",
        "dataset",
        "length",
        "duration",
        "fps",
        "text",
        "title",
        "alt",
        "tags",
    ]
)


def unused(fields: Mapping[str, Any], read: set[str], pictured: bool) -> tuple[str, ...]:
    """Returns the keys that carry nothing, and checks that none carries more.

    Args:
      fields: An entry, or a message of one.
      read: The keys that are read: OF_CHAT, OF_PAIR or OF_MESSAGE.
      pictured: Whether the entry names pictures where they are read. Other keys about pictures
        only describe those then.
    Raises:
      BadSample: If a key carries what training would need and does not read. It names the key.
    """
    if fields.keys() <= read:
        return ()
    others = [key for key in fields if key not in read and not _empty(fields[key])]
    for key in others:
        objection = _objection(key, fields[key], read, pictured)
        if objection:
            raise BadSample(f"key {quoted(key)} {objection}")
    return tuple(others)


def is_pair(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has the answers of a preference pair."""
    return any(not _empty(entry.get(key)) for key in (*CHOSEN, *REJECTED))


def may_matter(key: str) -> bool:
    """Whether the value of a column of this name has to be looked at."""
    return key in OF_PAIR or bool(_objection(key, "text", OF_PAIR, pictured=False))


def is_about_pictures(key: str) -> bool:
    """Whether a key names pictures, or tells something about them."""
    return any(map(_PICTURE.search, _words(key)))


def _words(key: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(key)] or [key]


def first_of(entry: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Returns the value of the one of `keys` that an entry has; None if it has none.

    Null, an empty text and an empty list count as absent, unless nothing else is there.

    Raises:
      BadSample: If several of them have values that differ.
    """
    there = [key for key in keys if entry.get(key) is not None]
    full = [key for key in there if not _empty(entry[key])] or there[:1]
    if any(entry[key] != entry[full[0]] for key in full[1:]):
        raise BadSample(f"{' and '.join(full)} have different values: expected one of these keys")
    return entry[full[0]] if full else None


def listed(entry: Mapping[str, Any]) -> str:
    """Returns the keys of an entry for a message."""
    return quoted(", ".join(map(str, entry)))[1:-1] or "no key"


def _objection(key: str, value: Any, read: set[str], pictured: bool) -> str:
    """Says why a record cannot be used without a key that is not read; empty if it can."""
    words = _words(key)
    if key in _TOOLS:
        return "carries what training cannot use"
    if key in LEARNT and not isinstance(value, str) and value == 0:
        return "says that the record is not learnt"
    if isinstance(value, (bool, int, float)):
        return ""
    if words[0] in ("system", "sys") and words[-1] in _SYSTEM_TEXT:
        return f"is not known: expected a system text under {', '.join(SYSTEM)}"
    if key in CHOSEN or key in REJECTED:
        return "of a preference pair, which only kind = 'preference' reads (--kind=preference)"
    if words[-1] in _DESCRIBES:
        return ""
    if any(map(_OTHER_MEDIA.search, words)):
        return "is not supported: only pictures are"
    if not pictured and (is_about_pictures(key) or _names_file(value)):
        return "is not known, and seems to name pictures: expected image or images"
    if key.lower() in read:
        return f"is not known: expected {quoted(key.lower())}"
    return ""


def _names_file(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(
        isinstance(text, str) and bool(_FILE.search(text) or text.startswith("data:"))
        for text in values
    )


def _empty(value: Any) -> bool:
    return value is None or (hasattr(value, "__len__") and len(value) == 0)
