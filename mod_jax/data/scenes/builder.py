"""The built-in data set: a TFDS builder of pictures of simple objects, with chats and pairs.

Everything is drawn from (seed, split, index) alone. Records therefore do not depend on the order in
which they are made, and no two splits share a record. `python -m mod_jax.data.scenes` prepares it.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from mod_jax.config import require
from mod_jax.data import MARKER
from mod_jax.data.scenes.chats import (
    CHAT,
    KINDS,
    absent_objects,
    converse,
    habitual_caption,
    named_objects,
    wrong_answer,
)
from mod_jax.data.scenes.drawing import (
    SceneDifficulty,
    SceneObject,
    draw,
    encode_png,
    place_objects,
)

__all__ = [
    "KINDS",
    "SPLITS",
    "SceneDifficulty",
    "SceneObject",
    "Scenes",
    "ScenesConfig",
    "absent_objects",
    "load_scenes",
    "make_record",
    "named_objects",
    "prepare",
    "read_objects",
    "read_turns",
]

SPLITS = ("train", "crowd", "preference", "test")


@dataclasses.dataclass(kw_only=True)
class ScenesConfig(tfds.core.BuilderConfig):
    """Sizes of the splits, and how their records are made.

    Attributes:
      name: Derived from all other fields, so that configurations have folders of their own.
      seed: Seed of the whole set.
      train: Records of the split; 0 leaves it out.
      crowd: As `train`.
      preference: As `train`.
      test: As `train`.
      wrong_share: Share of the answers of `crowd` that are wrong.
      habit_share: Share of the captions of `train` and `crowd` that follow habit, among those for
        which `chats.habitual_caption` has one.
      difficulty: Difficulty of the pictures.
    """

    name: str = ""
    seed: int = 0
    train: int = 16000
    crowd: int = 8000
    preference: int = 4000
    test: int = 1000
    wrong_share: float = 0.25
    habit_share: float = 0.7
    difficulty: SceneDifficulty = dataclasses.field(default_factory=SceneDifficulty)

    def __post_init__(self):
        require(
            0 <= self.wrong_share <= 0.5,
            "scenes.wrong_share",
            self.wrong_share,
            "a share between 0 and 0.5",
        )
        require(
            0 <= self.habit_share <= 1,
            "scenes.habit_share",
            self.habit_share,
            "a share between 0 and 1",
        )
        values = {
            key: getattr(self, key) for key in ("seed", *SPLITS, "wrong_share", "habit_share")
        }
        text = json.dumps({**values, "difficulty": dataclasses.asdict(self.difficulty)})
        self.name = f"scenes-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        self.description = text


def _is_wrong(rng: Random, answer: str, share: float) -> bool:
    """Draws whether a crowd answer is wrong.

    Crowds lean to "yes": a false "yes" is four times as likely as a false "no".
    """
    skew = {"yes": 0.4, "no": 1.6}.get(answer, 1.0)
    return rng.random() < share * skew


def make_record(
    seed: int,
    split: str,
    index: int,
    difficulty: SceneDifficulty,
    wrong_share: float = 0.25,
    habit_share: float = 0.7,
) -> dict:
    """Makes one record, as the builder stores it.

    Args:
      seed: Seed of the whole set.
      split: One of SPLITS. The answers of `test` are right. So are those of `train`, except for
        captions that follow habit. In `crowd` a share of the other answers is wrong too.
        `preference` holds pairs of a right and a wrong caption.
      index: Number of the record within its split.
      difficulty: Difficulty of the picture.
      wrong_share: See `ScenesConfig`.
      habit_share: See `ScenesConfig`.
    Returns:
      {id, image: PNG bytes, turns: JSON of [[kind, question, answer], ...], rejected: text (""
      unless the split is `preference`), objects: JSON of SceneObjects}. A preference pair has one
      turn, whose answer is the right caption; the rejected caption names an object that is absent.
    """
    numbers = np.random.default_rng((seed, SPLITS.index(split), index))
    objects = place_objects(numbers, difficulty)
    image = encode_png(draw(objects, numbers, difficulty))
    rng = Random(int(numbers.integers(2**63)))
    kinds = ("caption",) if split == "preference" else rng.sample(CHAT, len(CHAT))
    turns = converse(rng, kinds, objects, difficulty)
    rejected = ""
    by_habit = habitual_caption(objects)
    if split == "preference":
        rejected = by_habit or wrong_answer(rng, turns[0], objects, difficulty)
    if split in ("train", "crowd") and by_habit and rng.random() < habit_share:
        turns = [
            turn._replace(answer=by_habit) if turn.kind == "caption" else turn for turn in turns
        ]
    if split == "crowd":
        turns = [
            turn._replace(answer=wrong_answer(rng, turn, objects, difficulty))
            if _is_wrong(rng, turn.answer, wrong_share)
            else turn
            for turn in turns
        ]
    turns[0] = turns[0]._replace(question=f"{MARKER}\n{turns[0].question}")
    return {
        "id": f"{split}-{index}",
        "image": image,
        "turns": json.dumps(turns),
        "rejected": rejected,
        "objects": json.dumps(objects),
    }


def read_objects(text: str | bytes) -> list[SceneObject]:
    """Parses the objects of a record, which are in reading order."""
    return [SceneObject(*item) for item in json.loads(text)]


def read_turns(text: str | bytes) -> list[tuple[str, str, str]]:
    """Parses the turns of a record into (kind, question, answer).

    The first question begins with the marker of the picture.
    """
    return [tuple(turn) for turn in json.loads(text)]


class Scenes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the scenes. It does not need TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [ScenesConfig()]

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.difficulty.image_size
        text = tfds.features.Text()
        picture = tfds.features.Image(shape=(side, side, 3), encoding_format="png")
        features = tfds.features.FeaturesDict(
            {"id": text, "image": picture, "turns": text, "rejected": text, "objects": text}
        )
        return self.dataset_info_from_configs(features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        sizes = {split: getattr(self.builder_config, split) for split in SPLITS}
        return {
            split: self._generate_examples(split, size) for split, size in sizes.items() if size
        }

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        for index in range(size):
            record = make_record(
                config.seed,
                split,
                index,
                config.difficulty,
                config.wrong_share,
                config.habit_share,
            )
            yield index, record


def prepare(data_dir: str | pathlib.Path, **options) -> pathlib.Path:
    """Prepares a set under `data_dir`, unless the same configuration is already there.

    TFDS writes into a temporary folder and renames it at the end, so a set is complete or absent.

    Args:
      data_dir: TFDS data folder.
      **options: Fields of ScenesConfig.
    Returns:
      The folder of the prepared set, a `path` for `SourceConfig(kind="scenes")`.
    """
    builder = Scenes(
        config=ScenesConfig(**options), data_dir=str(data_dir), file_format="array_record"
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(register_checksums=False, compute_stats="skip")
    )
    return pathlib.Path(builder.data_path)


def load_scenes(path: str | pathlib.Path, split: str) -> Sequence[dict[str, Any]]:
    """Opens a prepared split for random access.

    Args:
      path: A folder that `prepare` returned, or a data folder that holds exactly one such folder.
      split: One of SPLITS.
    Returns:
      Dicts as `make_record` returns them, but with texts as bytes.
    Raises:
      ConfigError: If there is no set, more than one set, or no such split.
    """
    remedy = f"Make one with: python -m mod_jax.data.scenes --data_dir {path}"
    folders = sorted(
        info.parent
        for info in pathlib.Path(path).glob("**/dataset_info.json")
        if "incomplete" not in str(info)
    )
    require(
        len(folders) > 0,
        "data.sources.path",
        str(path),
        "a folder with a prepared scenes set",
        remedy,
    )
    require(
        len(folders) == 1,
        "data.sources.path",
        str(path),
        f"exactly one prepared set, found {[str(folder) for folder in folders]}",
        "Name one of them.",
    )
    builder = tfds.builder_from_directory(folders[0])
    require(
        split in builder.info.splits,
        "data.sources.split",
        split,
        f"one of {list(builder.info.splits)}",
    )
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
