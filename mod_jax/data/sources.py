"""Where records come from: LLaVA's JSON chats, JSON preference pairs, and the built-in scenes; all by number."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from mod_jax.config import ConfigError, SourceConfig, require
from mod_jax.data.scenes import load_scenes, read_turns

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
        raise BadSample(f"picture token without picture: {markers} tokens, {len(record.images)} pictures")
    if markers < len(record.images):
        raise BadSample(f"picture without picture token: {markers} tokens, {len(record.images)} pictures")
    return record


def without_pictures(record: Record) -> Record:
    """The texts of a record alone."""
    turns = tuple((question.replace(MARKER, "").strip(), answer) for question, answer in record.turns)
    return dataclasses.replace(record, images=(), turns=turns)


def parse_turns(messages: Sequence[dict]) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs of LLaVA messages {from: human | gpt, value}; outer white space is dropped.

    Raises:
      BadSample: if human and gpt do not alternate, or a message is no such thing.
    """
    try:
        roles, texts = [m["from"] for m in messages], [m["value"].strip() for m in messages]
    except (TypeError, KeyError, AttributeError):
        raise BadSample("conversation is not a list of {from, value}") from None
    unknown = sorted(set(roles) - {"human", "gpt"}, key=str)
    if unknown:
        raise BadSample(f"unknown speaker {unknown[0]!r}, expected human or gpt")
    if roles != ["human", "gpt"] * (len(roles) // 2):
        raise BadSample("human and gpt do not take turns")
    return tuple(zip(texts[::2], texts[1::2]))


def pair_turns(entry: dict) -> tuple[tuple[tuple[str, str], ...], str]:
    """The chosen conversation of a preference entry, and the rejected last answer.

    Raises:
      BadSample: if the two differ in more than their last answer, or not even in that.
    """
    chosen, rejected = parse_turns(entry.get("chosen")), parse_turns(entry.get("rejected"))
    if not chosen or not rejected or not rejected[-1][1]:
        raise BadSample("chosen or rejected without an answer text")
    if (chosen[:-1], chosen[-1][0]) != (rejected[:-1], rejected[-1][0]):
        raise BadSample("chosen and rejected have different human turns")
    return chosen, rejected[-1][1]


class JsonSource:
    """Random access to a JSON list of chats {id, image: str | list, conversations} or pairs {id, image, chosen, rejected}."""

    def __init__(self, config: SourceConfig):
        path, self._pairs, self._images = pathlib.Path(config.path), config.kind == "preference", pathlib.Path(config.images)
        require(path.is_file(), "data.sources.path", config.path, "an existing JSON file")
        require(config.text_only or not config.images or self._images.is_dir(), "data.sources.images", config.images, "an existing folder")
        try:
            self._entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"data.sources.path = {config.path!r}: expected a JSON list ({error}).") from error
        ok = isinstance(self._entries, list) and len(self._entries) > 0
        require(ok, "data.sources.path", config.path, "a JSON list with at least one record")

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, number: int) -> str:
        """The record's id, or its number where it has none."""
        entry = self._entries[number]
        return str(entry.get("id", number)) if isinstance(entry, dict) else str(number)

    def __getitem__(self, number: int) -> Record:
        entry = self._entries[number]
        if not isinstance(entry, dict):
            raise BadSample("record is not a JSON object")
        turns, rejected = pair_turns(entry) if self._pairs else (parse_turns(entry.get("conversations")), "")
        files = entry.get("image") or []
        images = tuple(self._images / file for file in ([files] if isinstance(files, str) else files))
        return Record(self.name(number), images, turns, rejected)


class ScenesSource:
    """Random access to a split of the built-in set."""

    def __init__(self, config: SourceConfig):
        self._records = load_scenes(config.path, config.split)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, number: int) -> str:
        """The record's id."""
        return self._records[number]["id"].decode()

    def __getitem__(self, number: int) -> Record:
        fields = self._records[number]
        turns = tuple((question, answer) for _, question, answer in read_turns(fields["turns"]))
        return Record(fields["id"].decode(), (fields["image"],), turns, fields["rejected"].decode())


KINDS = {"chat": JsonSource, "preference": JsonSource, "scenes": ScenesSource}


class Source:
    """The records of a configured source, checked, without pictures where the configuration says so."""

    def __init__(self, config: SourceConfig):
        self._records, self._text_only = KINDS[config.kind](config), config.text_only

    def __len__(self) -> int:
        return len(self._records)

    def name(self, number: int) -> str:
        """The record's id."""
        return self._records.name(number)

    def __getitem__(self, number: int) -> Record:
        record = self._records[number]
        return check(without_pictures(record) if self._text_only else record)


def open_source(config: SourceConfig) -> Source:
    """Opens a source.

    Returns:
      `len(source)`, `source[number] -> Record` (raises BadSample), `source.name(number) -> str`.
    Raises:
      ConfigError: if the file, the folder or the prepared set is not there or is of another form.
    """
    return Source(config)
