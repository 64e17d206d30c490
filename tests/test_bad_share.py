"""The one rule for too many bad records: certain by counting, or beyond chance; never by order."""

import math

import numpy as np
import pytest

from mod_jax.data.samples.bad_share import ACCIDENT, Read, least_bad, too_many


@pytest.mark.parametrize(
    "bad, records, limit, refused",
    [
        (0, 40, 0.0, False),
        (1, 40, 0.0, True),
        (1, 40, 0.01, True),
        (1, 100, 0.01, False),
        (2, 100, 0.01, True),
        (29, 100, 0.29, False),  # 0.29 * 100 is less than 29 in floating point
        (30, 100, 0.29, True),
        (36, 40, 0.9, False),
        (39, 40, 1.0, False),
        (40, 40, 1.0, True),
        (1, 1, 1.0, True),
    ],
)
def test_a_set_that_was_read_is_judged_by_its_share(bad, records, limit, refused):
    assert too_many([Read(bad, records, records)], limit) == refused
    half = Read(bad, records, records), Read(0, 0, 0)
    assert too_many(half, limit) == refused


def test_bad_records_that_are_too_many_already_need_no_more_reading():
    assert too_many([Read(2, 3, 100)], 0.01)
    assert not too_many([Read(1, 3, 100)], 0.01)


def binomial_tail(bad: int, seen: int, share: float) -> float:
    """Probability of at least `bad` bad ones among those seen, summed term by term."""
    return math.fsum(
        math.comb(seen, k) * share**k * (1 - share) ** (seen - k) for k in range(bad, seen + 1)
    )


@pytest.mark.parametrize("bad, seen", [(20, 20), (30, 60), (40, 200), (60, 1000), (15, 16)])
def test_what_chance_could_explain_is_not_held_against_a_large_set(bad, seen):
    """Below the least number, what was seen is too improbable; the bound is not far too careful."""
    records = 10**8
    share = least_bad(Read(bad, seen, records)) / records
    assert binomial_tail(bad, seen, share) <= ACCIDENT * 1.001
    assert binomial_tail(bad, seen, share) >= ACCIDENT / 100
    assert not too_many([Read(bad, seen, records)], share * 1.001)
    assert too_many([Read(bad, seen, records)], share * 0.999)


@pytest.mark.parametrize("weights", [(1, 1), (1, 20), (20, 1)])
def test_a_set_that_keeps_to_the_limit_is_never_refused_for_its_order(weights):
    """Whatever the mixture: 12 of 20 and 8 of 2000 are bad, 1 % of all, after any number read."""
    rng = np.random.default_rng(0)
    sets = [(12, 20), (8, 1980)]
    for _ in range(200):
        orders = [rng.permutation(records) < bad for bad, records in sets]
        for steps in (3, 10, 30, 100, 300):
            seen = [min(steps * w, len(order)) for w, order in zip(weights, orders)]
            read = [
                Read(int(order[:count].sum()), count, len(order))
                for order, count in zip(orders, seen)
            ]
            assert not too_many(read, 0.01)


def test_records_that_are_read_again_and_again_are_judged_by_chance_alone():
    """39 of 40 are bad: a run of so many bad ones is longer than the set, but no accident."""
    assert not too_many([Read(64, 64, 40, repeated=True)], 1.0)
    assert too_many([Read(1000, 1000, 40, repeated=True)], 1.0)
    assert too_many([Read(64, 64, 40, repeated=True)], 0.5)
