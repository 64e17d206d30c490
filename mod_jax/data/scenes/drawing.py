"""Draws pictures of simple objects on a grid.

Axes: H and W are the picture's height and width, h and w those of the square around one object.
"""

import dataclasses
import functools
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from mod_jax.config import require

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 40),
    "purple": (130, 50, 160),
    "orange": (245, 130, 25),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}

# Shape -> whether a point is inside. x and y run over -1..1 in the object's square, y downwards.
SHAPES = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.9,
    "triangle": lambda x, y: (y <= 0.85) & (abs(x) <= (y + 1) / 1.85),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.33) & (np.maximum(abs(x), abs(y)) <= 1),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3),
    "bar": lambda x, y: (abs(y) <= 0.35) & (abs(x) <= 1),
    "star": lambda x, y: np.sqrt(abs(x)) + np.sqrt(abs(y)) <= 1.1,
}

SIZES = {"large": 0.92, "small": 0.6}  # side of an object's square as a share of its cell's side
BACKGROUND = 190  # mean grey level


class SceneObject(NamedTuple):
    """One object. `row` and `column` are those of its cell, counted from the upper left."""

    shape: str
    colour: str
    size: str
    row: int
    column: int


@dataclasses.dataclass(frozen=True)
class SceneDifficulty:
    """How hard the pictures are.

    Attributes:
      grid: Cells along each side.
      cell: Side of a cell in px.
      min_objects: Least number of objects.
      max_objects: Greatest number of objects.
      jitter: Greatest distance in px, along each axis, of an object from the middle of its cell.
        Objects may then overlap.
      shapes: Number of shapes in use, the first ones of `SHAPES`.
      colours: Number of colours in use, the first ones of `COLOURS`.
      sizes: Number of sizes in use, the first ones of `SIZES`.
      noise: Half the range of the background's grey levels.
    """

    grid: int = 3
    cell: int = 12
    min_objects: int = 1
    max_objects: int = 4
    jitter: int = 0
    shapes: int = 4
    colours: int = 5
    sizes: int = 2
    noise: int = 12

    def __post_init__(self):
        require(
            1 <= self.min_objects <= self.max_objects <= self.grid**2,
            "difficulty.max_objects",
            self.max_objects,
            f"min_objects ({self.min_objects}) to the number of cells ({self.grid**2})",
        )
        for key, table in (("shapes", SHAPES), ("colours", COLOURS), ("sizes", SIZES)):
            least = 1 if key == "sizes" else 2
            require(
                least <= getattr(self, key) <= len(table),
                f"difficulty.{key}",
                getattr(self, key),
                f"{least} to {len(table)}",
            )
        require(
            self.max_objects < self.shapes * self.colours,
            "difficulty.max_objects",
            self.max_objects,
            f"fewer than shapes x colours = {self.shapes * self.colours}, so that one is absent",
        )

    @property
    def image_size(self) -> int:
        """Side of a picture in px."""
        return self.grid * self.cell


@functools.cache
def coverage(shape: str, side: int) -> np.ndarray:
    """Returns the share of each pixel that `shape` covers, f32[h,w,1].

    Args:
      shape: One of `SHAPES`.
      side: Side of the object's square in px. Each pixel is sampled at 4 x 4 points.
    """
    points = (np.arange(side * 4) + 0.5) / (side * 2) - 1
    inside = SHAPES[shape](points[None, :], points[:, None])
    return inside.reshape(side, 4, side, 4).mean((1, 3), dtype=np.float32)[..., None]


def place_objects(rng: np.random.Generator, difficulty: SceneDifficulty) -> list[SceneObject]:
    """Draws random objects in distinct cells, in reading order."""
    count = int(rng.integers(difficulty.min_objects, difficulty.max_objects + 1))
    cells = np.sort(rng.permutation(difficulty.grid**2)[:count])
    picks = rng.integers(0, (difficulty.shapes, difficulty.colours, difficulty.sizes), (count, 3))
    shapes = tuple(SHAPES)
    colours = tuple(COLOURS)
    sizes = tuple(SIZES)
    objects = []
    for cell, (shape, colour, size) in zip(cells.tolist(), picks.tolist()):
        row, column = divmod(cell, difficulty.grid)
        objects.append(SceneObject(shapes[shape], colours[colour], sizes[size], row, column))
    return objects


def draw(
    objects: list[SceneObject], rng: np.random.Generator, difficulty: SceneDifficulty
) -> np.ndarray:
    """Draws the picture, u8[H,W,3], with a noisy grey background.

    Objects are drawn in order, so that later ones cover earlier ones.
    """
    side = difficulty.image_size
    grey = rng.integers(
        BACKGROUND - difficulty.noise,
        BACKGROUND + difficulty.noise + 1,
        (side, side, 1),
        dtype=np.uint8,
    )
    picture = np.repeat(grey, 3, axis=2)
    jitter = rng.integers(-difficulty.jitter, difficulty.jitter + 1, (len(objects), 2)).tolist()
    for item, shifts in zip(objects, jitter):
        mask = coverage(item.shape, round(difficulty.cell * SIZES[item.size]))
        margin = (difficulty.cell - len(mask)) // 2
        top, left = (
            int(np.clip(cell * difficulty.cell + margin + shift, 0, side - len(mask)))
            for cell, shift in zip((item.row, item.column), shifts)
        )
        window = picture[top : top + len(mask), left : left + len(mask)]
        colour = np.array(COLOURS[item.colour], np.float32)
        window[:] = np.rint(window + mask * (colour - window))
    return picture


def encode_png(picture: np.ndarray) -> bytes:
    """Encodes u8[H,W,3] as PNG, lightly compressed for speed."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()
