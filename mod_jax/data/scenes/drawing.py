"""Pictures of simple objects on a grid.

Axes: H W picture height and width, h w those of one object's square.
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

# Shape -> is the point inside? x and y run over -1..1 within the object's square, y downwards.
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

SIZES = {"large": 0.92, "small": 0.6}  # side of an object's square, as a share of the cell
BACKGROUND = 190  # mean grey


class SceneObject(NamedTuple):
    """One object; row and column number its cell, from the upper left."""

    shape: str
    colour: str
    size: str
    row: int
    column: int


@dataclasses.dataclass(frozen=True)
class SceneDifficulty:
    """How hard the pictures are."""

    grid: int = 3  # cells a side
    cell: int = 12  # px
    min_objects: int = 1
    max_objects: int = 4
    jitter: int = (
        0  # px an object may stray from its cell's middle (objects then overlap), each way
    )
    shapes: int = 4
    colours: int = 5
    sizes: int = 2
    noise: int = 12  # half the range of the background's grey levels

    def __post_init__(self):
        require(
            1 <= self.min_objects <= self.max_objects <= self.grid**2,
            "difficulty.max_objects",
            self.max_objects,
            f"min_objects {self.min_objects} .. the number of cells {self.grid**2}",
        )
        for key, table in (("shapes", SHAPES), ("colours", COLOURS), ("sizes", SIZES)):
            least = 1 if key == "sizes" else 2
            require(
                least <= getattr(self, key) <= len(table),
                f"difficulty.{key}",
                getattr(self, key),
                f"{least}..{len(table)}",
            )

        require(
            self.max_objects < self.shapes * self.colours,
            "difficulty.max_objects",
            self.max_objects,
            f"fewer than shapes x colours = {self.shapes * self.colours}, so that something is absent",
        )

    @property
    def image_size(self) -> int:
        """Side of a picture in px."""
        return self.grid * self.cell


@functools.cache
def coverage(shape: str, side: int) -> np.ndarray:
    """Share of each pixel that `shape` covers, f32[h,w,1], from 4 x 4 points a pixel."""
    points = (np.arange(side * 4) + 0.5) / (side * 2) - 1
    inside = SHAPES[shape](points[None, :], points[:, None])
    return inside.reshape(side, 4, side, 4).mean((1, 3), dtype=np.float32)[..., None]


def place_objects(rng: np.random.Generator, difficulty: SceneDifficulty) -> list[SceneObject]:
    """Random objects in distinct cells, in reading order."""
    count = int(rng.integers(difficulty.min_objects, difficulty.max_objects + 1))
    cells = np.sort(rng.permutation(difficulty.grid**2)[:count])
    picks = rng.integers(0, (difficulty.shapes, difficulty.colours, difficulty.sizes), (count, 3))
    shapes, colours, sizes = tuple(SHAPES), tuple(COLOURS), tuple(SIZES)
    return [
        SceneObject(shapes[s], colours[c], sizes[z], *divmod(int(cell), difficulty.grid))
        for cell, (s, c, z) in zip(cells, picks.tolist())
    ]


def draw(
    objects: list[SceneObject], rng: np.random.Generator, difficulty: SceneDifficulty
) -> np.ndarray:
    """The picture, u8[H,W,3]: objects in order over a noisy grey background, later ones over earlier ones."""
    side = difficulty.image_size
    grey = rng.integers(
        BACKGROUND - difficulty.noise,
        BACKGROUND + difficulty.noise + 1,
        (side, side, 1),
        dtype=np.uint8,
    )
    picture = np.repeat(grey, 3, axis=2)
    strays = rng.integers(-difficulty.jitter, difficulty.jitter + 1, (len(objects), 2)).tolist()
    for item, stray in zip(objects, strays):
        mask = coverage(item.shape, round(difficulty.cell * SIZES[item.size]))
        margin = (difficulty.cell - len(mask)) // 2
        top, left = (
            int(np.clip(cell * difficulty.cell + margin + s, 0, side - len(mask)))
            for cell, s in zip((item.row, item.column), stray)
        )
        window = picture[top : top + len(mask), left : left + len(mask)]
        window[:] = np.rint(window + mask * (np.float32(COLOURS[item.colour]) - window))
    return picture


def encode_png(picture: np.ndarray) -> bytes:
    """PNG of u8[H,W,3]; lightly compressed, for speed."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()
