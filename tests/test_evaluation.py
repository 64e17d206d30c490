"""Evaluation on scenes, and counts of parameters.

What is measured: shares of right answers, the hallucination rate, the rate of "yes" and F1.
"""

import dataclasses

import numpy as np
import pytest
from small import DENSE, SPARSE, VISION, params_of

from mod_jax.config import DecoderConfig, EvaluationConfig, ModelConfig, MoEConfig
from mod_jax.data.scenes.builder import prepare
from mod_jax.evals import scenes
from mod_jax.inference import generation
from mod_jax.models import llava

PICTURES = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = prepare(
        tmp_path_factory.mktemp("scenes"), train=0, crowd=0, preference=0, test=PICTURES + 2
    )
    return EvaluationConfig(path=str(path), pictures=PICTURES, rows=5)


@pytest.fixture
def measured(config, monkeypatch):
    """A function that evaluates a model which answers each `Asked` with `reply(asked)`."""

    def run(reply):
        asked = {
            (item.question.text, item.question.pictures[0].tobytes()): item
            for item in scenes.read_questions(config, VISION)
        }

        def fake(model, params, tokenizer, template, questions, rows, max_new_tokens):
            assert (template, rows) == ("brief", 5)
            return [
                reply(asked[question.text, question.pictures[0].tobytes()])
                for question in questions
            ]

        monkeypatch.setattr(scenes, "answer", fake)
        return scenes.evaluate(config, DENSE, llava.abstract(DENSE), None)

    return run


def test_questions_are_those_of_the_first_pictures_each_asked_alone(config):
    asked = scenes.read_questions(config, VISION)
    assert len(asked) == 6 * PICTURES
    assert {item.kind for item in asked} == {"caption", "count", "colour", "relation", "existence"}
    for item in asked:
        assert "<image>" not in item.question.text and item.right and item.objects
        assert [(picture.shape, picture.dtype) for picture in item.question.pictures] == [
            ((8, 8, 3), np.uint8)
        ]


def test_a_model_that_knows_everything(measured):
    found = measured(lambda item: item.right)
    assert found["accuracy"] == found["named"] == found["existence"]["f1"] == 1
    assert found["hallucination"] == 0
    assert found["by_type"] == {"count": 1, "colour": 1, "relation": 1, "existence": 1}
    assert found["questions"] == 6 * PICTURES


def test_a_model_that_knows_nothing(measured):
    found = measured(lambda item: "unknown")
    assert found["accuracy"] == found["named"] == 0
    assert found["existence"] == {"yes_rate": 0, "f1": 0}
    assert found["hallucination"] == 1  # a caption without objects is no answer


@pytest.mark.parametrize("reply", ["", " ", "!!!!!!!!", "<unk>", "a picture"])
def test_an_answer_that_is_no_answer_never_scores(measured, reply):
    """A model that is dead answers with nothing, or with one token over and over."""
    found = measured(lambda item: reply)
    assert found["accuracy"] == found["named"] == 0
    assert set(found["by_type"].values()) == {0}
    assert found["existence"] == {"yes_rate": 0, "f1": 0}
    assert found["hallucination"] == 1


def test_a_caption_without_objects_counts_beside_those_with(measured, config):
    first = scenes.read_questions(config, VISION)[0].objects

    def reply(item):
        silent = item.kind == "caption" and item.objects == first
        return "" if silent else item.right

    assert measured(reply)["hallucination"] == pytest.approx(1 / PICTURES)


def test_captions_do_not_count_as_answers_and_answers_not_as_captions(measured):
    found = measured(lambda item: item.right if item.kind == "caption" else "a red nothing")
    assert found["accuracy"] == 0 and found["named"] == 1 and found["hallucination"] == 0


def test_one_absent_object_makes_a_caption_a_hallucination(measured, config):
    """Objects that are present do not outweigh it; colour and shape must meet in one object."""
    first = scenes.read_questions(config, VISION)[0].objects
    absent = next(
        (c, s)
        for c in ("red", "green", "blue")
        for s in ("circle", "square", "cross")
        if (c, s) not in {(o.colour, o.shape) for o in first}
    )

    def reply(item):
        if item.kind == "caption" and item.objects == first:
            return f"{item.right} and a {absent[0]} {absent[1]}"
        return item.right

    found = measured(reply)
    assert found["hallucination"] == pytest.approx(1 / PICTURES)
    assert found["named"] == found["accuracy"] == 1


def test_yes_to_everything_has_full_recall_and_the_precision_of_the_share_of_yes(measured, config):
    right = [
        item.right for item in scenes.read_questions(config, VISION) if item.kind == "existence"
    ]
    share = right.count("yes") / len(right)
    assert 0 < share < 1
    found = measured(lambda item: "yes")["existence"]
    assert found["yes_rate"] == 1 and found["f1"] == pytest.approx(2 * share * 1 / (share + 1))


def test_no_to_everything_has_an_f1_of_zero(measured):
    assert measured(lambda item: "no")["existence"] == {"yes_rate": 0, "f1": 0}


def test_parameters_in_all_and_for_one_token():
    """Two of four layers are sparse, and a token activates two of their four experts."""
    D, F, V, N, K, H = 32, 64, 80, 4, 2, 8
    attention = D * N * H + 2 * D * K * H + (N + 2 * K) * H + N * H * D
    layers = 4 * (attention + 2 * D) + 2 * 3 * D * F + 2 * (4 * 3 * D * F + D * 4)
    tower_layer = 4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16 + 4 * 16
    tower = 16 + 48 * 16 + 5 * 16 + 4 * 16 + 2 * tower_layer
    adaptor = 16 * D + D + D * D + D
    decoder = dataclasses.replace(SPARSE.decoder, num_layers=4)
    found = llava.count(decoder.moe, llava.abstract(dataclasses.replace(SPARSE, decoder=decoder)))
    total = V * D + layers + D + tower + adaptor
    assert found == {"total": total, "activated": total - 2 * 2 * 3 * D * F}


def test_the_published_student_activates_what_the_paper_says():
    """Qwen1.5-1.8B with four experts in every second layer has 3.0 B parameters, 2.2 B activated.

    The paper counts those of the language model.
    """
    decoder = DecoderConfig(
        hidden_size=2048,
        intermediate_size=5504,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        tie_embeddings=False,
        moe=MoEConfig(),
    )
    model = ModelConfig(decoder=decoder)
    language_model = {
        name: array
        for name, array in llava.abstract(model).items()
        if name.startswith("language_model.")
    }
    found = llava.count(decoder.moe, language_model)
    assert found == {
        "total": pytest.approx(3.0e9, rel=0.03),
        "activated": pytest.approx(2.2e9, rel=0.03),
    }


def test_a_dead_model_gives_no_answer():
    """NaN has no largest logit; argmax would return token 0, which may be any word."""
    model = dataclasses.replace(DENSE, end_token_id=7)
    params = {name: x * np.float32(np.nan) for name, x in params_of(DENSE).items()}
    ones = np.ones((2, 3), np.int32)
    images = np.zeros((2, 0, 8, 8, 3), np.uint8)
    prompts = generation.Prompts(5 * ones, ones, -ones, images)
    assert (np.asarray(generation.generate(model, params, prompts, 2)) == 7).all()
