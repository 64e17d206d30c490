"""Models as a configuration names them: their identity, and whether a tokenizer is theirs."""

import dataclasses
import json

import numpy as np
import pytest
from small import DENSE, params_of

from mod_jax.config import ConfigError
from mod_jax.data.samples.tokenizer import scenes_tokenizer
from mod_jax.interop.model import Model, check_tokenizer

NAMES = ["language_model.norm.scale_d", "adaptor.linear_1.b_o"]
PARAMS = {name: np.asarray(params_of(DENSE)[name]) for name in NAMES}
MODEL = Model(DENSE, PARAMS, "models/teacher")


def with_decoder(**changes):
    """The configuration with changes of its language model."""
    return dataclasses.replace(DENSE, decoder=dataclasses.replace(DENSE.decoder, **changes))


# What may change -> the model.
SAME = {
    "where it is": dataclasses.replace(MODEL, origin="/elsewhere/models/teacher"),
    "what is recomputed": Model(dataclasses.replace(DENSE, remat="full"), PARAMS, "x"),
    "what else ends an answer": Model(
        dataclasses.replace(DENSE, other_end_token_ids=(3,)), PARAMS, "x"
    ),
    "a parameter that is not asked for": Model(DENSE, PARAMS | {"other": np.ones(2)}, "x"),
}
OTHER = {
    "a number": Model(DENSE, PARAMS | {NAMES[0]: PARAMS[NAMES[0]] + 1}, MODEL.origin),
    "the rotary base": Model(with_decoder(rope_theta=1.0), PARAMS, MODEL.origin),
    "the end token": Model(dataclasses.replace(DENSE, end_token_id=5), PARAMS, MODEL.origin),
}


@pytest.mark.parametrize("change", SAME)
def test_identity_is_content_and_no_path(change):
    assert SAME[change].identity(NAMES) == MODEL.identity(NAMES)
    assert MODEL.origin not in json.dumps(MODEL.identity(NAMES))


@pytest.mark.parametrize("change", OTHER)
def test_another_content_is_another_identity(change):
    assert OTHER[change].identity(NAMES) != MODEL.identity(NAMES)


TOKENIZER = scenes_tokenizer()
ROWS = len(TOKENIZER)


def test_a_model_knows_the_ids_of_its_tokenizer():
    check_tokenizer(with_decoder(vocab_size=ROWS), "here", TOKENIZER)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"end_token_id": 5}, "end_token_id of here = 5: expected the tokenizer's, 0"),
        ({"image_token_id": 5}, "image_token_id of here = 5: expected the tokenizer's, 1"),
        (
            {"decoder": dataclasses.replace(DENSE.decoder, vocab_size=ROWS - 1)},
            f"vocabulary of here = {ROWS - 1}: expected more embedding rows than .* {ROWS - 1}",
        ),
        (
            {"other_end_token_ids": (DENSE.decoder.vocab_size,)},
            "other_end_token_ids in here = .*expected less than",
        ),
    ],
)
def test_a_model_that_does_not_know_them_is_refused(changes, message):
    config = dataclasses.replace(DENSE, **changes)
    with pytest.raises(ConfigError, match=message):
        check_tokenizer(config, "here", TOKENIZER)
