"""The work that both sides of a comparison do: sizes of the models, and the samples of a batch.

Neither jax nor torch is imported, as each side runs in an environment of its own.

A sample is a question with one picture, and its answer takes half of the text. A dense teacher is
twice as wide as the sparse student, every second feed-forward layer of which has experts, two for
each token. The experts, their routers and the adaptor train.

Axes: B samples, S positions, R tokens of an answer, A answers (a pair has two).
"""

import dataclasses
from typing import NamedTuple

import numpy as np

PICTURE_TOKEN, END_TOKEN = 1, 0
FIRST_TEXT = 4  # tokens before the picture
NEW_TOKENS = 32  # that are decoded
LOSS_ROWS = 1024  # positions when the loss is measured alone
TEACHER_WIDTH = 2  # times the student's
BETA, BALANCE_WEIGHT, LEARNING_RATE = 0.1, 0.01, 2e-5
WORK = ("mimic", "preference")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the student, its tower and a batch.

    Attributes:
      width, layers, heads, kv_heads, inner: Of the decoder; `inner` is the feed-forward width.
      words: Rows of the vocabulary, also the teacher's.
      positions: Of a question with its picture and one answer.
      samples: Samples of a batch.
      image_size, patch: Height and width of a picture and of a patch, px.
      tower_width, tower_layers, tower_heads, tower_inner: Of the vision tower.
      experts: Of a sparse layer, two for each token.
      answer_share: Share of a text that is its answer.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    words: int
    positions: int
    samples: int
    image_size: int
    patch: int
    tower_width: int
    tower_layers: int
    tower_heads: int
    tower_inner: int
    experts: int = 4
    answer_share: float = 0.5

    @property
    def features(self) -> int:
        """Positions of a picture."""
        return (self.image_size // self.patch) ** 2

    @property
    def answer(self) -> int:
        """Tokens of an answer."""
        return int((self.positions - self.features) * self.answer_share)

    @property
    def question(self) -> int:
        """Positions before an answer, the picture's included."""
        return self.positions - self.answer


PRESETS = {
    # for the fixture of a test: its weights have to be small
    "test": Sizes(16, 2, 4, 2, 24, 48, 24, 2, 8, 4, 16, 3, 2, 24),
    "tiny": Sizes(64, 4, 4, 2, 176, 512, 64, 4, 32, 8, 64, 3, 4, 128),
    "small": Sizes(256, 8, 8, 2, 704, 8192, 256, 4, 112, 14, 128, 4, 4, 512),
    "real-vocab": Sizes(256, 4, 8, 2, 704, 151936, 512, 2, 224, 14, 128, 4, 4, 512),
}


class Samples(NamedTuple):
    """Questions, each with a picture and two answers.

    Attributes:
      questions: i32[B,S-R], with PICTURE_TOKEN at the positions of the picture.
      answers: i32[B,A,R].
      images: u8[B,H,W,3].
    """

    questions: np.ndarray
    answers: np.ndarray
    images: np.ndarray


def draw(sizes: Sizes, seed: int = 0) -> Samples:
    """A batch of random tokens and pictures."""
    random = np.random.default_rng(seed)
    questions = random.integers(2, sizes.words, (sizes.samples, sizes.question), np.int32)
    questions[:, FIRST_TEXT : FIRST_TEXT + sizes.features] = PICTURE_TOKEN
    answers = random.integers(2, sizes.words, (sizes.samples, 2, sizes.answer), np.int32)
    shape = (sizes.samples, sizes.image_size, sizes.image_size, 3)
    return Samples(questions, answers, random.integers(0, 256, shape, np.uint8))


def positions_of(sizes: Sizes, work: str) -> int:
    """Positions of a batch as a user counts them: a pair is two samples, whatever is shared."""
    answers = 2 if work == "preference" else 1
    return answers * sizes.samples * sizes.positions
