"""Texts about a scene: questions with right and wrong answers, captions, and captions parsed back.

The kinds of questions are those of `KINDS`. A name of an object is a pair (colour, shape).
"""

import re
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from mod_jax.data.scenes.drawing import COLOURS, SHAPES, SceneDifficulty, SceneObject

KINDS = ("caption", "count", "colour", "relation", "existence")
CHAT = ("caption", "count", "colour", "relation", "existence", "existence")  # kinds of a chat
NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
)
RELATIONS = {  # relation -> whether a is <relation> b
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
CAPTION_QUESTION = "Describe the picture."
_NAME = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


class Question(NamedTuple):
    """One turn: a question of a kind, and its answer."""

    kind: str
    question: str
    answer: str


def plural(shape: str) -> str:
    """Returns the plural of a shape: "crosses", "circles"."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


# Captions in real data name what usually stands beside an object, even if the picture does not show
# it. Here a circle of the same colour usually stands beside a cross.
COMPANIONS = {"cross": "circle"}
WORDS = tuple(  # all words that the texts can contain, in lower case
    dict.fromkeys(
        [
            *COLOURS,
            *SHAPES,
            *map(plural, SHAPES),
            *NUMBERS,
            "describe",
            "the",
            "picture",
            "how",
            "many",
            "objects",
            "are",
            "there",
            "what",
            "colour",
            "is",
            "left",
            "right",
            "of",
            "above",
            "below",
            "a",
            "an",
            "small",
            "and",
            "yes",
            "no",
        ]
    )
)


def noun_phrase(size: str, colour: str, shape: str) -> str:
    """Returns "a small red ring"; the size of a large object is not named."""
    words = ("small " if size == "small" else "") + f"{colour} {shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(objects: Sequence) -> str:
    """Names all objects in order: "a red circle, a small blue square and a green ring"."""
    *others, last = [noun_phrase(item.size, item.colour, item.shape) for item in objects]
    return f"{', '.join(others)} and {last}" if others else last


def named_objects(text: str) -> list[tuple[str, str]]:
    """Returns (colour, shape) of every object that a text names, in the order of the text."""
    return _NAME.findall(text.lower())


def absent_objects(text: str, objects: Sequence[SceneObject]) -> list[tuple[str, str]]:
    """Returns (colour, shape) of the hallucinations: objects that a text names but are absent."""
    present = names(objects)
    return [name for name in named_objects(text) if name not in present]


def names(objects: Sequence[SceneObject]) -> list[tuple[str, str]]:
    """Returns (colour, shape) of each object."""
    return [(item.colour, item.shape) for item in objects]


def absent_name(
    rng: Random, objects: Sequence[SceneObject], difficulty: SceneDifficulty
) -> tuple[str, str]:
    """Draws the name of an absent object.

    With probability 1/2, if possible, its colour and its shape both occur in the picture, but on
    different objects.
    """
    present = set(names(objects))
    shown_colours = sorted({colour for colour, _ in present})
    shown_shapes = sorted({shape for _, shape in present})
    near_misses = [
        (colour, shape)
        for colour in shown_colours
        for shape in shown_shapes
        if (colour, shape) not in present
    ]
    if near_misses and rng.random() < 0.5:
        return rng.choice(near_misses)
    colours = tuple(COLOURS)[: difficulty.colours]
    shapes = tuple(SHAPES)[: difficulty.shapes]
    absent = [
        (colour, shape) for colour in colours for shape in shapes if (colour, shape) not in present
    ]
    return rng.choice(absent)


def _caption(rng: Random, objects: Sequence[SceneObject], difficulty: SceneDifficulty) -> Question:
    return Question("caption", CAPTION_QUESTION, caption(objects))


def _count(rng: Random, objects: Sequence[SceneObject], difficulty: SceneDifficulty) -> Question:
    shown = [item.shape for item in objects]
    if rng.random() < 0.2:
        return Question("count", "How many objects are there?", NUMBERS[len(objects)])
    shapes = shown if rng.random() < 0.8 else tuple(SHAPES)[: difficulty.shapes]
    shape = rng.choice(shapes)
    return Question("count", f"How many {plural(shape)} are there?", NUMBERS[shown.count(shape)])


def _colour(rng: Random, objects: Sequence[SceneObject], difficulty: SceneDifficulty) -> Question:
    shown = [item.shape for item in objects]
    unambiguous = [item for item in objects if shown.count(item.shape) == 1]
    if not unambiguous:
        return _count(rng, objects, difficulty)
    item = rng.choice(unambiguous)
    return Question("colour", f"What colour is the {item.shape}?", item.colour)


def _relation(rng: Random, objects: Sequence[SceneObject], difficulty: SceneDifficulty) -> Question:
    shown = names(objects)
    unambiguous = [item for item in objects if shown.count((item.colour, item.shape)) == 1]
    pairs = [
        (a, b, relation)
        for a in unambiguous
        for b in unambiguous
        for relation, holds in RELATIONS.items()
        if holds(a, b)
    ]
    if not pairs:
        return _existence(rng, objects, difficulty)
    a, b, relation = rng.choice(pairs)
    answer = rng.choice(("yes", "no"))
    first, second = (a, b) if answer == "yes" else (b, a)
    return Question(
        "relation",
        f"Is the {first.colour} {first.shape} {relation} the {second.colour} {second.shape}?",
        answer,
    )


def _existence(
    rng: Random, objects: Sequence[SceneObject], difficulty: SceneDifficulty
) -> Question:
    answer = rng.choice(("yes", "no"))
    if answer == "yes":
        colour, shape = rng.choice(names(objects))
    else:
        colour, shape = absent_name(rng, objects, difficulty)
    return Question("existence", f"Is there {noun_phrase('large', colour, shape)}?", answer)


ASK = {
    "caption": _caption,
    "count": _count,
    "colour": _colour,
    "relation": _relation,
    "existence": _existence,
}


def ask(
    rng: Random, kind: str, objects: Sequence[SceneObject], difficulty: SceneDifficulty
) -> Question:
    """Draws a question of a kind, with its right answer.

    If no question of this kind has a unique answer for the picture, a similar kind takes its place:
    count for colour, existence for relation.
    """
    return ASK[kind](rng, objects, difficulty)


def converse(
    rng: Random, kinds: Sequence[str], objects: Sequence[SceneObject], difficulty: SceneDifficulty
) -> list[Question]:
    """Draws a question of each kind in turn.

    Each is drawn four times and the first one that was not asked before is taken, so repetitions
    are rare.
    """
    turns: list[Question] = []
    for kind in kinds:
        draws = [ask(rng, kind, objects, difficulty) for _ in range(4)]
        turns.append(next((turn for turn in draws if turn not in turns), draws[0]))
    return turns


def hallucinated_caption(
    rng: Random, objects: Sequence[SceneObject], difficulty: SceneDifficulty
) -> str:
    """Returns a caption with one absent object, which replaces a true one or is added to them."""
    named = list(objects)
    colour, shape = absent_name(rng, objects, difficulty)
    place = rng.randrange(len(named))
    replaced = rng.randint(0, 1)  # number of true objects that the absent one replaces
    named[place : place + replaced] = [named[place]._replace(colour=colour, shape=shape)]
    return caption(named)


def habitual_caption(objects: Sequence[SceneObject]) -> str | None:
    """Returns the caption by habit, which adds the absent companion of the last object.

    Returns None if the last object has no companion, or the picture shows the companion. Unlike
    random errors, a habit is regular, so a model learns it.
    """
    last = objects[-1]
    companion = last._replace(shape=COMPANIONS.get(last.shape, last.shape), size="large")
    if (companion.colour, companion.shape) in names(objects):
        return None
    return caption([*objects, companion])


def wrong_answer(
    rng: Random, asked: Question, objects: Sequence[SceneObject], difficulty: SceneDifficulty
) -> str:
    """Draws a plausible wrong answer to a question about these objects."""
    if asked.kind == "caption":
        return hallucinated_caption(rng, objects, difficulty)
    if asked.kind == "count":
        right = NUMBERS.index(asked.answer)
        neighbours = [number for number in (right - 1, right + 1) if 0 <= number < len(NUMBERS)]
        return NUMBERS[rng.choice(neighbours)]
    if asked.kind == "colour":
        colours = tuple(COLOURS)[: difficulty.colours]
        return rng.choice([colour for colour in colours if colour != asked.answer])
    return "no" if asked.answer == "yes" else "yes"
