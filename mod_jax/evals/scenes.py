"""Held-out questions about scenes: answer accuracy by kind of question, and hallucination.

Every question is asked alone, on its picture, and answered greedily. An answer is right if its text is the right text. Captions
are judged by what they name: an object (colour and shape) that the picture does not show is a hallucination (as CHAIR does
with MSCOCO's objects, Rohrbach et al. 2018); existence questions also by yes-rate and F1 of "yes" (as POPE does, Li et al. 2023).
"""

import dataclasses

import numpy as np

from mod_jax.config import EvaluationConfig, ModelConfig, VisionConfig
from mod_jax.data.samples.pixels import load_image
from mod_jax.data.scenes.builder import load_scenes, read_objects, read_turns
from mod_jax.data.scenes.chats import KINDS, absent_objects, named_objects, names
from mod_jax.inference.generation import Question, answer
from mod_jax.models import llava

CAPTION_TOKENS, ANSWER_TOKENS = 40, 4


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question of the set, with its right answer and what the picture shows."""

    kind: str
    question: Question
    right: str
    objects: tuple


def read_questions(config: EvaluationConfig, vision: VisionConfig) -> list[Asked]:
    """The questions of the first `config.pictures` records of the split."""
    records, asked = load_scenes(config.path, config.split), []
    for number in range(min(config.pictures, len(records))):
        record = records[number]
        picture, objects = (
            load_image(record["image"], vision),
            tuple(read_objects(record["objects"])),
        )
        asked += [
            Asked(kind, Question(text, (picture,)), right, objects)
            for kind, text, right in read_turns(record["turns"])
        ]
    # a marker stands in the first question of a record only
    return [
        dataclasses.replace(
            item,
            question=dataclasses.replace(
                item.question, text=item.question.text.removeprefix("<image>\n")
            ),
        )
        for item in asked
    ]


def evaluate(config: EvaluationConfig, model: ModelConfig, params: dict, tokenizer) -> dict:
    """Measures a model.

    Returns:
      {"accuracy": share of right answers (captions aside), "by_type": {kind: share}, "hallucination": share of captions that name an absent
      object, "named": share of the pictures' objects that captions name, "existence": {"yes_rate", "f1"}, "parameters": {"total", "activated"},
      "questions": how many}.
    """
    asked = read_questions(config, model.vision)
    captions, others = (
        [item for item in asked if (item.kind == "caption") == wanted] for wanted in (True, False)
    )

    def said(items, new_tokens):
        return answer(
            model,
            params,
            tokenizer,
            config.template,
            [item.question for item in items],
            config.rows,
            new_tokens,
        )

    answers = said(others, ANSWER_TOKENS)
    right = {
        kind: [text == item.right for item, text in zip(others, answers) if item.kind == kind]
        for kind in KINDS
        if kind != "caption"
    }
    existence = [
        (text == "yes", item.right == "yes")
        for item, text in zip(others, answers)
        if item.kind == "existence"
    ]
    true_yes, said_yes, are_yes = (
        sum(map(pick, existence)) for pick in (all, lambda pair: pair[0], lambda pair: pair[1])
    )
    told = list(zip(said(captions, CAPTION_TOKENS), captions))
    return {
        "accuracy": float(np.mean([ok for oks in right.values() for ok in oks])),
        "by_type": {kind: float(np.mean(oks)) for kind, oks in right.items()},
        "hallucination": float(
            np.mean([bool(absent_objects(text, item.objects)) for text, item in told])
        ),
        "named": float(
            np.mean(
                [name in named_objects(text) for text, item in told for name in names(item.objects)]
            )
        ),
        "existence": {
            "yes_rate": said_yes / len(existence),
            "f1": 2 * true_yes / max(1, said_yes + are_yes),
        },
        "parameters": llava.count(model.decoder.moe, params),
        "questions": len(asked),
    }
