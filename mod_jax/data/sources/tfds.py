"""Data sets in TFDS's form, prepared as array_record, which is read by number and without TensorFlow."""

import pathlib

import tensorflow_datasets as tfds
from tensorflow_datasets import features
from tensorflow_datasets.core.dataset_info import DatasetInfoFileError
from tensorflow_datasets.core.registered import DatasetNotFoundError

from mod_jax.config import ConfigError, SourceConfig, require
from mod_jax.data.sources.array_record import read_stored
from mod_jax.data.sources.llava_form import read_chat, read_pair
from mod_jax.data.sources.record import BadSample, Record, printable

KEY = "data.sources.path"
REMEDY = "Prepare it with: tfds build --file_format=array_record."


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves pictures as they are stored, also those of a sequence, for which TFDS's own class has no method without TensorFlow."""

    def decode_batch_example_np(self, pictures):
        return list(pictures)


def _is_text(feature) -> bool:
    return isinstance(feature, features.Text)


def _is_messages(feature) -> bool:
    inner = feature.feature if isinstance(feature, features.Sequence) else None
    return isinstance(inner, features.FeaturesDict) and all(
        key in inner and _is_text(inner[key]) for key in ("from", "value")
    )


def _is_picture(feature) -> bool:
    return isinstance(
        feature.feature if isinstance(feature, features.Sequence) else feature, features.Image
    )


def _text(value: bytes) -> str:
    return value.decode()


def _messages(value: dict) -> list[dict]:
    return [
        {"from": speaker.decode(), "value": text.decode()}
        for speaker, text in zip(value["from"], value["value"])
    ]


FORMS = (  # the features that make one, how they are known, how they are read, what reads the entry
    (("conversations",), _is_messages, _messages, read_chat),
    (("chosen", "rejected"), _is_messages, _messages, read_pair),
    (("question", "chosen", "rejected"), _is_text, _text, read_pair),
)
EXPECTED = "conversations, or chosen and rejected, as sequences of {from, value}, or question, chosen and rejected as texts; image, one or a sequence, and id"


class TfdsSource:
    """Random access to a split of a data set with the features of one of FORMS; `image` (Image, or a Sequence of them) and `id` are optional."""

    def __init__(self, config: SourceConfig):
        builder = open_builder(config.path)
        self._folder, known = pathlib.Path(builder.data_path), dict(builder.info.features)
        require(
            config.split in builder.info.splits,
            "data.sources.split",
            config.split,
            f"one of {list(builder.info.splits)}",
        )
        forms = [
            form for form in FORMS if all(key in known and form[1](known[key]) for key in form[0])
        ]
        fits = forms and ("image" not in known or _is_picture(known["image"]))
        require(
            fits,
            KEY,
            config.path,
            f"a data set with the features {EXPECTED}; it has {' '.join(str(builder.info.features).split())}",
        )
        self._keys, _, self._convert, self._read = forms[0]
        self._text_only = config.text_only
        decoders = {key: _Encoded() for key, feature in known.items() if _is_picture(feature)}
        try:
            self._records = builder.as_data_source(config.split, decoders=decoders)
        except NotImplementedError:
            raise ConfigError(
                f"{KEY} = {config.path!r}: expected array_record, found {builder.info.file_format}. {REMEDY}"
            ) from None

    def __len__(self) -> int:
        return len(self._records)

    def name(self, number: int) -> str:
        """The record's id; its number where it has none or cannot be read."""
        try:
            return _name(read_stored(self._records, number, self._folder), number)
        except ValueError:  # BadSample, or ConfigError
            return str(number)

    def __getitem__(self, number: int) -> Record:
        fields = read_stored(self._records, number, self._folder)
        pictures = () if self._text_only else fields.get("image") or ()
        images = (pictures,) if isinstance(pictures, bytes) else tuple(pictures)
        try:
            turns, rejected = self._read(
                {key: self._convert(fields[key]) for key in self._keys}, len(images)
            )
        except UnicodeDecodeError as error:
            raise BadSample(f"text is not UTF-8: {error}") from None
        return Record(_name(fields, number), images, turns, rejected)


def _name(fields: dict, number: int) -> str:
    name = fields.get("id", number)
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else printable(name)


def open_builder(path: str) -> tfds.core.DatasetBuilder:
    """The builder of a prepared data set.

    Args:
      path: its folder, the one with dataset_info.json; or its name, found in TFDS's data folders.
    Raises:
      ConfigError: if nothing is prepared there.
    """
    try:
        builder = (
            tfds.builder_from_directory(path) if pathlib.Path(path).is_dir() else tfds.builder(path)
        )
    except (DatasetNotFoundError, DatasetInfoFileError) as error:
        raise ConfigError(
            f"{KEY} = {path!r}: expected the folder or the name of a prepared TFDS data set ({error})."
        ) from None
    require(len(builder.info.splits) > 0, KEY, path, "a prepared data set", REMEDY)
    return builder
