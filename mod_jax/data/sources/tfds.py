"""Data sets of TFDS, prepared as array_record, which allows random access without TensorFlow."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets import features
from tensorflow_datasets.core.dataset_info import DatasetInfoFileError
from tensorflow_datasets.core.registered import DatasetNotFoundError

from mod_jax.config import ConfigError, require
from mod_jax.data.sources import keys
from mod_jax.data.sources.array_record import index_of_split, read_stored
from mod_jax.data.sources.llava_form import Reader, read_chat, read_pair
from mod_jax.data.sources.pictures import NoPictures
from mod_jax.data.sources.record import BadSample, Record, printable

KEY = "data.sources.path"
REMEDY = "Prepare it with: tfds build --file_format=array_record."


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves pictures encoded, also those of a Sequence.

    For a Sequence, TFDS's own class has no method that works without TensorFlow.
    """

    def decode_batch_example_np(self, pictures) -> list[bytes]:
        """Returns the encoded pictures of a Sequence."""
        return list(pictures)


def _is_text(feature) -> bool:
    return isinstance(feature, features.Text)


def _is_messages(feature) -> bool:
    inner = feature.feature if isinstance(feature, features.Sequence) else None
    return isinstance(inner, features.FeaturesDict) and all(
        key in inner and _is_text(inner[key]) for key in ("from", "value")
    )


def _is_picture(feature) -> bool:
    inner = feature.feature if isinstance(feature, features.Sequence) else feature
    return isinstance(inner, features.Image)


def _plain(value: Any) -> Any:
    """Turns a value of TFDS into the types of JSON: texts, numbers, lists, and messages."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        columns = {key: _plain(column) for key, column in value.items()}
        if not all(isinstance(column, list) for column in columns.values()):
            return columns
        return [dict(zip(columns, row)) for row in zip(*columns.values())]
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value


class _Form(NamedTuple):
    """A form of entries that is recognised by the features of a data set.

    Attributes:
      keys: The features that hold the texts.
      fits: Whether a feature has the type that this form needs.
      read: Makes a record of the entry.
    """

    keys: tuple[str, ...]
    fits: Callable[[Any], bool]
    read: Reader


FORMS = (
    _Form(("conversations",), _is_messages, read_chat),
    _Form(("chosen", "rejected"), _is_messages, read_pair),
    _Form(("question", "chosen", "rejected"), _is_text, read_pair),
    _Form(("prompt", "chosen", "rejected"), _is_text, read_pair),
)
EXPECTED = (
    "conversations, or chosen and rejected, as sequences of {from, value}, or question (or "
    "prompt), chosen and rejected as texts; image or images, one or a sequence, system and id are "
    "optional"
)


class TfdsSource:
    """Random access to a split of a data set whose features are one of `FORMS`.

    The features `image` or `images` (an Image, or a Sequence of them), `system` and `id` are
    optional. Of the others, those are read that matter by their names (`keys`).
    """

    def __init__(self, path: str, split: str):
        """Opens the split.

        Args:
          path: See `open_builder`.
          split: One of the data set's splits.
        Raises:
          ConfigError: If nothing is prepared there, or it lacks the split, has other features or is
            not stored as array_record.
        """
        builder = open_builder(path)
        self._folder = pathlib.Path(builder.data_path)
        splits = builder.info.splits
        require(split in splits, "data.sources.split", split, f"one of {list(splits)}")
        known = dict(builder.info.features)
        forms = [
            form
            for form in FORMS
            if all(key in known and form.fits(known[key]) for key in form.keys)
        ]
        pictures_fit = all(_is_picture(known[key]) for key in keys.PICTURES if key in known)
        found = " ".join(str(builder.info.features).split())
        require(
            len(forms) > 0 and pictures_fit,
            KEY,
            path,
            f"a data set with the features {EXPECTED}; it has {found}",
        )
        self._form = forms[0]
        self._read = [key for key in known if keys.may_matter(key)]
        self._unread = tuple(key for key in known if not keys.may_matter(key))
        self._pictures = frozenset(key for key, feature in known.items() if _is_picture(feature))
        self._index = index_of_split(splits[split])
        decoders = {key: _Encoded() for key in self._pictures}
        try:
            self._records = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError:
            found = builder.info.file_format
            raise ConfigError(
                f"{KEY} = {path!r}: expected array_record, found {found}. {REMEDY}"
            ) from None

    def __len__(self) -> int:
        return len(self._records)

    def index(self) -> bytes:
        """Returns the lengths of the split's shards, and its size in bytes."""
        return self._index

    def name(self, number: int) -> str:
        """Returns the record's id, or its number if it has none or cannot be read."""
        try:
            return _name(read_stored(self._records, number, self._folder), number)
        except ValueError:  # BadSample or ConfigError
            return str(number)

    def __getitem__(self, number: int) -> Record:
        fields = read_stored(self._records, number, self._folder)
        try:
            entry = {key: self._value(key, fields[key]) for key in self._read}
        except UnicodeDecodeError as error:
            raise BadSample(f"text is not UTF-8: {error}") from None
        record = self._form.read(entry, _name(fields, number), NoPictures())
        return dataclasses.replace(record, unused=record.unused + self._unread)

    def _value(self, key: str, value: Any) -> Any:
        if key not in self._pictures:
            return _plain(value)
        return value if isinstance(value, bytes) or value is None else list(value)


def _name(fields: dict, number: int) -> str:
    name = fields.get("id", number)
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else printable(name)


def open_builder(path: str) -> tfds.core.DatasetBuilder:
    """Opens the builder of a prepared data set.

    Args:
      path: Its folder, which holds dataset_info.json, or its name in TFDS's data folders.
    Raises:
      ConfigError: If nothing is prepared there.
    """
    try:
        if pathlib.Path(path).is_dir():
            builder = tfds.builder_from_directory(path)
        else:
            builder = tfds.builder(path)
    except (DatasetNotFoundError, DatasetInfoFileError) as error:
        raise ConfigError(
            f"{KEY} = {path!r}: expected the folder or the name of a prepared TFDS data set "
            f"({error})."
        ) from None
    require(len(builder.info.splits) > 0, KEY, path, "a prepared data set", REMEDY)
    return builder
