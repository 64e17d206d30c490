"""Held-out questions about scenes: answer accuracy by kind of question, and hallucination.

Every question is asked alone, about its picture, and answered greedily. An answer is right if its
text equals the right text. Captions are judged by what they name: an object (colour and shape) that
the picture does not show is a hallucination, as in CHAIR with the objects of MSCOCO (Rohrbach et
al. 2018). Every picture shows objects, so a caption that names none is no answer; it counts as a
hallucination, as silence would otherwise score best. Existence questions are also judged by the
yes-rate and the F1 of "yes", as in POPE (Li et al. 2023).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mod_jax.config import EvaluationConfig, ModelConfig, VisionConfig
from mod_jax.data.samples.pixels import load_image
from mod_jax.data.scenes.builder import load_scenes, read_objects, read_turns
from mod_jax.data.scenes.chats import KINDS, absent_objects, named_objects, names
from mod_jax.data.scenes.drawing import SceneObject
from mod_jax.inference.generation import Question, answer
from mod_jax.models import llava

# largest numbers of new tokens
CAPTION_TOKENS = 40
ANSWER_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question of the set.

    Attributes:
      kind: One of `KINDS`.
      question: The question and its picture.
      right: The right answer.
      objects: What the picture shows.
    """

    kind: str
    question: Question
    right: str
    objects: tuple[SceneObject, ...]


def read_questions(config: EvaluationConfig, vision: VisionConfig) -> list[Asked]:
    """Reads the questions about the first `config.pictures` records of the split."""
    records = load_scenes(config.path, config.split)
    asked = []
    for number in range(min(config.pictures, len(records))):
        record = records[number]
        picture = load_image(record["image"], vision)
        objects = tuple(read_objects(record["objects"]))
        for kind, text, right in read_turns(record["turns"]):
            # Only the first question of a record has the marker of the picture. Without a marker
            # the picture comes first.
            question = Question(text.removeprefix("<image>\n"), (picture,))
            asked.append(Asked(kind, question, right, objects))
    return asked


def evaluate(config: EvaluationConfig, model: ModelConfig, params: dict, tokenizer) -> dict:
    """Measures a model on the questions of a split.

    Args:
      config: What is asked.
      model: Configuration of the model.
      params: Name -> array.
      tokenizer: Tokenizer of the model.

    Returns:
      "accuracy": Share of right answers, captions aside.
      "by_type": Kind -> share of right answers, of each kind that was asked.
      "hallucination": Share of captions that name an absent object, or none at all.
      "named": Share of the pictures' objects that the captions name.
      "existence": {"yes_rate": share of "yes" among the answers, "f1": F1 of "yes"}.
      "parameters": {"total", "activated"}, from `llava.count`.
      "questions": Number of questions.
    """
    asked = read_questions(config, model.vision)
    captions = [item for item in asked if item.kind == "caption"]
    others = [item for item in asked if item.kind != "caption"]

    def answers_to(items: Sequence[Asked], new_tokens: int) -> list[str]:
        questions = [item.question for item in items]
        return answer(model, params, tokenizer, config.template, questions, config.rows, new_tokens)

    answers = answers_to(others, ANSWER_TOKENS)
    captioned = list(zip(answers_to(captions, CAPTION_TOKENS), captions))
    right = {
        kind: [text == item.right for item, text in zip(others, answers) if item.kind == kind]
        for kind in KINDS
        if any(item.kind == kind for item in others)
    }
    hallucinates = [
        not named_objects(text) or bool(absent_objects(text, item.objects))
        for text, item in captioned
    ]
    named = [
        name in named_objects(text) for text, item in captioned for name in names(item.objects)
    ]
    return {
        "accuracy": float(np.mean([ok for oks in right.values() for ok in oks])),
        "by_type": {kind: float(np.mean(oks)) for kind, oks in right.items()},
        "hallucination": float(np.mean(hallucinates)),
        "named": float(np.mean(named)),
        "existence": _yes_rate_and_f1(
            [
                (text == "yes", item.right == "yes")
                for item, text in zip(others, answers)
                if item.kind == "existence"
            ]
        ),
        "parameters": llava.count(model.decoder.moe, params),
        "questions": len(asked),
    }


def _yes_rate_and_f1(existence: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Yes-rate, and F1 of "yes", from (answered yes, yes is right) of each question."""
    answered_yes = sum(answered for answered, _ in existence)
    right_yes = sum(right for _, right in existence)
    true_yes = sum(answered and right for answered, right in existence)
    return {
        "yes_rate": answered_yes / len(existence),
        "f1": 2 * true_yes / max(1, answered_yes + right_yes),
    }
