"""What is said about a scene: questions with right answers, wrong answers, captions, and captions read back.

A question is (kind, question, answer); kinds are those of KINDS. Names are (colour, shape).
"""

import re
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from mod_jax.data.scenes.drawing import COLOURS, SHAPES, SceneDifficulty, SceneObject

KINDS = ("caption", "count", "colour", "relation", "existence")
CHAT = ("caption", "count", "colour", "relation", "existence", "existence")  # the kinds of one chat
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
RELATIONS = {  # is a <relation> b?
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
CAPTION_QUESTION = "Describe the picture."
_NAME = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


class Question(NamedTuple):
    """One turn."""

    kind: str
    question: str
    answer: str


def plural(shape: str) -> str:
    """ "crosses", "circles"."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


COMPANIONS = {
    "cross": "circle"
}  # captions found in the world name what usually stands beside: here, a circle of its colour beside a cross
WORDS = tuple(
    dict.fromkeys(
        [  # everything that can be said, in lower case
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
    """ "a small red ring"; large objects go without a size."""
    words = ("small " if size == "small" else "") + f"{colour} {shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(objects: Sequence) -> str:
    """All objects in their order: "a red circle, a small blue square and a green ring"."""
    phrases = [noun_phrase(item.size, item.colour, item.shape) for item in objects]
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def named_objects(text: str) -> list[tuple[str, str]]:
    """(colour, shape) of every object that a text names, in its order."""
    return _NAME.findall(text.lower())


def absent_objects(text: str, objects: Sequence[SceneObject]) -> list[tuple[str, str]]:
    """(colour, shape) of every object that a text names and the picture does not show: its hallucinations."""
    present = names(objects)
    return [name for name in named_objects(text) if name not in present]


def names(objects: Sequence[SceneObject]) -> list[tuple[str, str]]:
    """(colour, shape) of each object."""
    return [(item.colour, item.shape) for item in objects]


def absent_name(
    rng: Random, objects: Sequence[SceneObject], difficulty: SceneDifficulty
) -> tuple[str, str]:
    """A name that no object bears; half of the time, where possible, its colour and its shape are both in the picture, apart."""
    present = set(names(objects))
    apart = [
        (c, s)
        for c in sorted({c for c, _ in present})
        for s in sorted({s for _, s in present})
        if (c, s) not in present
    ]
    if apart and rng.random() < 0.5:
        return rng.choice(apart)
    colours, shapes = tuple(COLOURS)[: difficulty.colours], tuple(SHAPES)[: difficulty.shapes]
    return rng.choice([(c, s) for c in colours for s in shapes if (c, s) not in present])


def _caption(rng, objects, difficulty):
    return Question("caption", CAPTION_QUESTION, caption(objects))


def _count(rng, objects, difficulty):
    shown = [item.shape for item in objects]
    if rng.random() < 0.2:
        return Question("count", "How many objects are there?", NUMBERS[len(objects)])
    shape = (
        rng.choice(shown) if rng.random() < 0.8 else rng.choice(tuple(SHAPES)[: difficulty.shapes])
    )
    return Question("count", f"How many {plural(shape)} are there?", NUMBERS[shown.count(shape)])


def _colour(rng, objects, difficulty):
    shown = [item.shape for item in objects]
    single = [item for item in objects if shown.count(item.shape) == 1]
    if not single:
        return _count(rng, objects, difficulty)
    item = rng.choice(single)
    return Question("colour", f"What colour is the {item.shape}?", item.colour)


def _relation(rng, objects, difficulty):
    shown = names(objects)
    single = [item for item in objects if shown.count((item.colour, item.shape)) == 1]
    pairs = [
        (a, b, relation)
        for a in single
        for b in single
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


def _existence(rng, objects, difficulty):
    answer = rng.choice(("yes", "no"))
    colour, shape = (
        rng.choice(names(objects)) if answer == "yes" else absent_name(rng, objects, difficulty)
    )
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
    """A question of a kind with its right answer; of a neighbouring kind where the picture allows none that has one answer."""
    return ASK[kind](rng, objects, difficulty)


def converse(
    rng: Random, kinds: Sequence[str], objects: Sequence[SceneObject], difficulty: SceneDifficulty
) -> list[Question]:
    """A question of each kind in turn, none twice where a few draws find another."""
    turns = []
    for kind in kinds:
        draws = [ask(rng, kind, objects, difficulty) for _ in range(4)]
        turns.append(next((turn for turn in draws if turn not in turns), draws[0]))
    return turns


def hallucinated_caption(
    rng: Random, objects: Sequence[SceneObject], difficulty: SceneDifficulty
) -> str:
    """A caption with one object that is not there, in place of a true one or beside them."""
    told, (colour, shape) = list(objects), absent_name(rng, objects, difficulty)
    place = rng.randrange(len(told))
    told[place : place + rng.randint(0, 1)] = [told[place]._replace(colour=colour, shape=shape)]
    return caption(told)


def habitual_caption(objects: Sequence[SceneObject]) -> str | None:
    """The caption that habit makes of a picture: after a last object with a companion it names the companion, which is not there.

    None where the last object has none, or the picture shows it. Habit, unlike chance, is what a model learns to say.
    """
    last = objects[-1]
    companion = last._replace(shape=COMPANIONS.get(last.shape, last.shape), size="large")
    return (
        None
        if (companion.colour, companion.shape) in names(objects)
        else caption([*objects, companion])
    )


def wrong_answer(
    rng: Random, asked: Question, objects: Sequence[SceneObject], difficulty: SceneDifficulty
) -> str:
    """A plausible wrong answer to a question about these objects."""
    if asked.kind == "caption":
        return hallucinated_caption(rng, objects, difficulty)
    if asked.kind == "count":
        right = NUMBERS.index(asked.answer)
        return NUMBERS[rng.choice([n for n in (right - 1, right + 1) if 0 <= n < len(NUMBERS)])]
    if asked.kind == "colour":
        return rng.choice(
            [colour for colour in tuple(COLOURS)[: difficulty.colours] if colour != asked.answer]
        )
    return "no" if asked.answer == "yes" else "yes"
