"""The built-in data set: pictures of simple objects with chats and preference pairs about them, as a TFDS builder.

Everything is drawn from (seed, split, index) alone: records do not depend on the order in which they are made, and no two splits share any.

    python -m mod_jax.data.scenes --data_dir data/scenes
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from random import Random
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from mod_jax.config import require
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
MARKER = "<image>\n"


@dataclasses.dataclass(kw_only=True)
class ScenesConfig(tfds.core.BuilderConfig):
    """Sizes of the splits (0: none), and how records are made. The name tells two configurations apart."""

    name: str = ""  # derived
    seed: int = 0
    train: int = 16000
    crowd: int = 8000
    preference: int = 4000
    test: int = 1000
    wrong_share: float = 0.25  # of the answers of `crowd`
    habit_share: float = 0.7  # of the captions of `train` and `crowd` that habit can make, see `scene_chats.habitual_caption`
    difficulty: SceneDifficulty = dataclasses.field(default_factory=SceneDifficulty)

    def __post_init__(self):
        require(
            0 <= self.wrong_share <= 0.5,
            "scenes.wrong_share",
            self.wrong_share,
            "a share within 0..0.5",
        )
        require(
            0 <= self.habit_share <= 1,
            "scenes.habit_share",
            self.habit_share,
            "a share within 0..1",
        )
        values = {
            key: getattr(self, key) for key in ("seed", *SPLITS, "wrong_share", "habit_share")
        }
        text = json.dumps({**values, "difficulty": dataclasses.asdict(self.difficulty)})
        self.name, self.description = (
            f"scenes-{hashlib.sha256(text.encode()).hexdigest()[:8]}",
            text,
        )


def _is_wrong(rng: Random, kind: str, answer: str, share: float) -> bool:
    """Draws whether a crowd answer is wrong. Of yes and no, a false "yes" is four times as likely as a false "no"."""
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
    """One record, as the builder stores it.

    Args:
      seed: of the whole set.
      split: one of SPLITS. test: right answers; train: right but for captions by habit; crowd: a share of the others wrong too;
        preference: a right and a wrong caption.
      index: number within the split.
      difficulty: of the pictures.
      wrong_share: of the answers of `crowd`.
      habit_share: of the captions of `train` and `crowd` that habit can make.
    Returns:
      {id, image: PNG bytes, turns: JSON [[kind, question, answer], ...], rejected: text ("" unless preference), objects: JSON of SceneObjects}.
      Of a preference pair, a caption, the turn's answer is right; the rejected one names an object that is not there.
    """
    numbers = np.random.default_rng((seed, SPLITS.index(split), index))
    objects = place_objects(numbers, difficulty)
    image = encode_png(draw(objects, numbers, difficulty))
    rng = Random(int(numbers.integers(2**63)))
    kinds = ("caption",) if split == "preference" else rng.sample(CHAT, len(CHAT))
    turns, rejected = converse(rng, kinds, objects, difficulty), ""
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
            if _is_wrong(rng, turn.kind, turn.answer, wrong_share)
            else turn
            for turn in turns
        ]
    turns[0] = turns[0]._replace(question=MARKER + turns[0].question)
    return {
        "id": f"{split}-{index}",
        "image": image,
        "turns": json.dumps(turns),
        "rejected": rejected,
        "objects": json.dumps(objects),
    }


def read_objects(text: str | bytes) -> list[SceneObject]:
    """The objects of a record, in reading order."""
    return [SceneObject(*item) for item in json.loads(text)]


def read_turns(text: str | bytes) -> list[tuple[str, str, str]]:
    """(kind, question, answer) of each turn; the first question begins with the picture's marker."""
    return [tuple(turn) for turn in json.loads(text)]


class Scenes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the scenes; needs no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = epath.Path(
        __file__
    ).parent  # TFDS cannot infer it when this module is run as a command
    BUILDER_CONFIGS: ClassVar = [ScenesConfig()]

    def _info(self) -> tfds.core.DatasetInfo:
        side, text = self.builder_config.difficulty.image_size, tfds.features.Text()
        picture = tfds.features.Image(shape=(side, side, 3), encoding_format="png")
        features = tfds.features.FeaturesDict(
            {"id": text, "image": picture, "turns": text, "rejected": text, "objects": text}
        )
        return self.dataset_info_from_configs(features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {
            split: self._generate_examples(split, size)
            for split in SPLITS
            if (size := getattr(self.builder_config, split))
        }

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        for index in range(size):
            yield (
                index,
                make_record(
                    config.seed,
                    split,
                    index,
                    config.difficulty,
                    config.wrong_share,
                    config.habit_share,
                ),
            )


def prepare(data_dir: str | pathlib.Path, **options) -> pathlib.Path:
    """Makes the set under `data_dir` unless this very configuration is there already, whole (TFDS renames the folder into place at the end).

    Args:
      data_dir: TFDS data folder.
      **options: fields of ScenesConfig: seed, train, crowd, preference, test (records a split), wrong_share, difficulty.
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


def load_scenes(path: str | pathlib.Path, split: str):
    """Random access to a prepared split.

    Args:
      path: a folder that `prepare` returned, or a data folder that holds exactly one.
      split: one of SPLITS.
    Returns:
      A sequence of dicts as in make_record, texts as bytes.
    Raises:
      ConfigError: where no set, several sets, or no such split is found.
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
        f"one prepared set, found {[str(f) for f in folders]}",
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepares the built-in scenes set.")
    parser.add_argument("--data_dir", required=True)
    for split in SPLITS:
        parser.add_argument(
            f"--{split}", type=int, default=getattr(ScenesConfig, split), help="records"
        )
    options = vars(parser.parse_args())
    print(prepare(**options))


if __name__ == "__main__":
    main()
