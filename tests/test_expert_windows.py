"""Rounds of the expert exchange: their sizes, and who takes a place in them."""

import jax.numpy as jnp
import numpy as np
import pytest

from mod_jax.ops.expert_windows import routing_of, rows_of_rounds


@pytest.mark.parametrize(
    ("tokens", "choices", "peers", "experts", "rows"),
    [
        (2048, 2, 4, 1, (1280, 384)),  # a quarter more than 2048 * 2 / 4
        (2048, 2, 8, 1, (640, 256)),
        (2048, 2, 2, 2, (2560, 640)),
        (2048, 2, 2, 1, (2048, 0)),  # no token chooses an expert twice
        (2048, 2, 1, 4, (4096, 0)),
        (1, 2, 8, 1, (1, 0)),  # a token that is generated
    ],
)
def test_rows_of_rounds_are_whole_tiles_of_what_an_even_routing_needs(
    tokens, choices, peers, experts, rows
):
    assert rows_of_rounds(tokens, choices, peers, experts) == rows


def test_padding_takes_no_place_in_any_round():
    choices = jnp.array([[4, 4], [1, 3], [4, 4], [3, 4], [0, 3]])
    routing = routing_of(choices, 4, 1)
    assert routing.longest == routing.sent[0] == 5
    np.testing.assert_array_equal(routing.arriving, [[1, 1, 0, 3]])
