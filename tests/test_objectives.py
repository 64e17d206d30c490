"""Objectives: values and gradients of the published formulas, and sums over any split of a batch.

The formulas are computed by torch in float64.

Axes: B rows, S positions, D width, V vocabulary, G samples a row.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from mod_jax import objectives
from mod_jax.batch import Batch
from mod_jax.config import ObjectiveConfig
from mod_jax.objectives import View

S, G, D, V = 16, 3, 8, 32
BETA = 0.3


def make_row(*samples):
    """One row from samples, each a list of (branch, [weight of each position])."""
    row = {
        "segment_ids": np.zeros(S, np.int32),
        "branch_ids": np.zeros(S, np.int32),
        "loss_weights": np.zeros(S, np.float32),
    }
    at = 0
    for number, sample in enumerate(samples, start=1):
        for branch, weights in sample:
            here = slice(at, at + len(weights))
            row["segment_ids"][here] = number
            row["branch_ids"][here] = branch
            row["loss_weights"][here] = weights
            at += len(weights)
    numbers = np.arange(G, dtype=np.int32)
    return row | {"samples": np.where(numbers < len(samples), numbers, -1).astype(np.int32)}


def make_batch(*rows):
    """A batch of rows from `make_row`, with random tokens and targets and no pictures."""
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, V, (2, len(rows), S)).astype(np.int32)
    zeros = np.zeros((len(rows), S), np.int32)
    columns = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    images = jnp.zeros((len(rows), 0, 2, 2, 3), jnp.uint8)
    return Batch(
        tokens=tokens,
        targets=jnp.asarray(targets),
        positions=zeros,
        picture_index=zeros - 1,
        images=images,
        **columns,
    )


def chat(*weights):
    """A sample with one branch, given the loss weight of each position."""
    return [(0, weights)]


def pair(prefix, chosen, rejected):
    """A preference pair of these lengths; every position of both answers has a target."""
    return [(0, [0] * prefix), (1, [1] * chosen), (2, [1] * rejected)]


CHATS = make_batch(
    make_row(chat(0, 0, 1, 1), chat(0, 1, 1, 1, 1)),
    make_row(chat(0, 0, 0)),
    make_row(chat(0, 1), chat(0, 0, 1, 1, 1, 0)),
    make_row(),
)
PAIRS = make_batch(
    make_row(pair(2, 3, 2), pair(3, 1, 4)),
    make_row(pair(4, 2, 2)),
    make_row(),
    make_row(pair(1, 3, 3), chat(0, 1, 1), pair(2, 2, 1)),
)


def make_views(batch, seed=1):
    """Random views of a student and a teacher."""
    random = np.random.default_rng(seed)
    sizes = ((batch.tokens.shape[0], S, D), (V, D))
    return [
        View(*(jnp.asarray(random.normal(size=size), jnp.float32) for size in sizes))
        for _ in range(2)
    ]


class Aux(typing.NamedTuple):
    """What an objective reads of `MoEAux`."""

    balance: jax.Array
    z: jax.Array
    load: jax.Array


def make_aux(layers=2, experts=4, seed=2):
    random = np.random.default_rng(seed)
    sizes = ((layers,), (layers,), (layers, experts))
    return Aux(*(jnp.asarray(random.random(size), jnp.float32) for size in sizes))


DENSE = make_aux(layers=0)

loss = jax.jit(objectives.loss, static_argnames="config")
pair_ratios = jax.jit(objectives.pair_ratios)


@functools.partial(jax.jit, static_argnames="config")
def ours(config, batch, student, teacher):
    """(loss, metrics, gradient in the student's View) of a dense student on a global batch."""
    totals = objectives.totals(config, batch)
    run = lambda student: objectives.loss(config, batch, student, teacher, DENSE, totals)
    (value, metrics), gradient = jax.value_and_grad(run, has_aux=True)(student)
    return value, metrics, gradient


class Reference:
    """Student and teacher in torch float64.

    Attributes:
      leaves: [hidden states, head] of the student, which the gradients are taken in.
      student, teacher: log-probabilities f64[B,S,V].
    """

    def __init__(self, student, teacher):
        self.leaves = [
            torch.tensor(np.array(x), dtype=torch.float64, requires_grad=True)
            for x in (student.hidden, student.head_w_vd)
        ]
        self.student = (self.leaves[0] @ self.leaves[1].T).log_softmax(-1)
        self.teacher = torch.tensor(
            np.asarray(teacher.hidden, np.float64) @ np.asarray(teacher.head_w_vd, np.float64).T
        ).log_softmax(-1)

    def surprise(self, batch):
        """-log p of each target."""
        return [
            -self.student[row, position, int(batch.targets[row, position])]
            for row, position in np.argwhere(np.asarray(batch.loss_weights))
        ]

    def divergence(self, mask):
        """KL of each position in the mask."""
        return [
            functional.kl_div(
                self.student[r, s], self.teacher[r, s], log_target=True, reduction="sum"
            )
            for r, s in np.argwhere(mask)
        ]

    def ratios(self, batch):
        """(chosen, rejected) of each pair, either a list of log-ratios of its tokens."""
        found = []
        for row in range(batch.tokens.shape[0]):
            for segment in range(1, G + 1):
                answers = []
                for branch in (1, 2):
                    here = (
                        (batch.segment_ids[row] == segment)
                        & (batch.branch_ids[row] == branch)
                        & (batch.loss_weights[row] > 0)
                    )
                    log_ratios = self.student[row] - self.teacher[row]
                    answers.append(
                        [
                            log_ratios[position, int(batch.targets[row, position])]
                            for position in np.flatnonzero(here)
                        ]
                    )
                found += [answers] if all(answers) else []
        return found

    def check(self, value, gradient, desired):
        """Compares a loss and its gradient with those of the formula `desired`."""
        desired.backward()
        np.testing.assert_allclose(value, desired.item(), rtol=2e-5)
        for actual, leaf in zip((gradient.hidden, gradient.head_w_vd), self.leaves):
            np.testing.assert_allclose(actual, leaf.grad, rtol=1e-4, atol=1e-5)


def mean(values):
    return sum(values) / len(values)


def check_metric(metric, values):
    """Compares a metric, (sum, count), with the values that it is the mean of."""
    wanted = (sum(float(value.detach()) for value in values), len(values))
    np.testing.assert_allclose(metric, wanted, rtol=2e-5)


def test_next_token_is_the_mean_cross_entropy_over_answers():
    student, teacher = make_views(CHATS)
    reference = Reference(student, teacher)
    value, metrics, gradient = ours(ObjectiveConfig(), CHATS, student, None)
    reference.check(value, gradient, mean(reference.surprise(CHATS)))
    check_metric(metrics["next_token"], reference.surprise(CHATS))


@pytest.mark.parametrize("next_token_weight", [0.0, 0.7])
def test_mimic_is_the_mean_kl_over_answers(next_token_weight):
    student, teacher = make_views(CHATS)
    reference = Reference(student, teacher)
    config = ObjectiveConfig("mimic", next_token_weight)
    value, metrics, gradient = ours(config, CHATS, student, teacher)
    divergence = reference.divergence(np.asarray(CHATS.loss_weights))
    surprise = reference.surprise(CHATS)
    reference.check(value, gradient, mean(divergence) + next_token_weight * mean(surprise))
    check_metric(metrics["kl"], divergence)
    check_metric(metrics["next_token"], surprise)


def test_all_tokens_compares_every_position_that_the_next_one_continues():
    batch = make_batch(make_row(chat(0, 0, 1, 1), pair(2, 2, 3)), make_row(chat(0, 1, 1)))
    config = ObjectiveConfig("mimic", 0.5, all_tokens=True)
    mask = np.zeros((2, S), bool)
    # all but the last position of a sample or of a branch
    mask[0, [0, 1, 2, 4, 5, 6, 8, 9]] = True
    mask[1, [0, 1]] = True
    student, teacher = make_views(batch)
    reference = Reference(student, teacher)
    value, metrics, gradient = ours(config, batch, student, teacher)
    reference.check(
        value, gradient, mean(reference.divergence(mask)) + 0.5 * mean(reference.surprise(batch))
    )
    check_metric(metrics["kl"], reference.divergence(mask))
    check_metric(metrics["next_token"], reference.surprise(batch))
    assert (float(metrics["kl"][1]), float(metrics["next_token"][1])) == (10, 9)


@pytest.mark.parametrize("all_tokens", [False, True])
def test_a_student_equal_to_its_teacher_has_nothing_to_mimic(all_tokens):
    student, _ = make_views(CHATS)
    value, _, gradient = ours(
        ObjectiveConfig("mimic", all_tokens=all_tokens), CHATS, student, student
    )
    assert abs(float(value)) < 1e-6
    np.testing.assert_allclose(gradient.hidden, 0, atol=1e-6)


def kto(pairs):
    """KTO's loss over pairs, its reference points without gradient."""
    chosen, rejected = [sum(c) for c, _ in pairs], [sum(r) for _, r in pairs]
    kl_chosen, kl_rejected = (mean(x).clamp(min=0).detach() for x in (chosen, rejected))
    return mean(
        [1 - torch.sigmoid(BETA * (c - kl_rejected)) for c in chosen]
        + [1 - torch.sigmoid(BETA * (kl_chosen - r)) for r in rejected]
    )


def smoothed(pairs):
    """DPO's loss with labels smoothed by 0.1."""
    margins = [BETA * (sum(c) - sum(r)) for c, r in pairs]
    return mean(
        [-0.9 * functional.logsigmoid(m) - 0.1 * functional.logsigmoid(-m) for m in margins]
    )


PREFERENCES = {
    "sigmoid": (
        {},
        lambda pairs: mean([-functional.logsigmoid(BETA * (sum(c) - sum(r))) for c, r in pairs]),
    ),
    "smoothed": ({"preference": "sigmoid", "label_smoothing": 0.1}, smoothed),
    "hinge": ({}, lambda pairs: mean([torch.relu(1 - BETA * (sum(c) - sum(r))) for c, r in pairs])),
    "ipo": ({}, lambda pairs: mean([(mean(c) - mean(r) - 1 / (2 * BETA)) ** 2 for c, r in pairs])),
    "kto_pair": ({}, kto),
}


def preference(name):
    return ObjectiveConfig("preference", beta=BETA, **{"preference": name} | PREFERENCES[name][0])


@pytest.mark.parametrize("seed", [1, 2])  # mean rejected ratio: below 0, above 0
@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_losses_are_the_published_formulas(name, seed):
    student, teacher = make_views(PAIRS, seed)
    reference = Reference(student, teacher)
    value, metrics, gradient = ours(preference(name), PAIRS, student, teacher)
    desired = PREFERENCES[name][1](reference.ratios(PAIRS))
    reference.check(value, gradient, desired)
    np.testing.assert_allclose(metrics["preference"], (5 * desired.item(), 5), rtol=2e-5)


def test_rewards_are_reported_over_pairs():
    student, teacher = make_views(PAIRS)
    pairs = [(sum(c).item(), sum(r).item()) for c, r in Reference(student, teacher).ratios(PAIRS)]
    desired = {
        "reward_chosen": BETA * sum(c for c, _ in pairs),
        "reward_rejected": BETA * sum(r for _, r in pairs),
        "reward_margin": BETA * sum(c - r for c, r in pairs),
        "reward_accuracy": sum(c > r for c, r in pairs),
    }
    _, metrics, _ = ours(preference("kto_pair"), PAIRS, student, teacher)
    for name, value in desired.items():
        np.testing.assert_allclose(metrics[name], (value, 5), rtol=1e-5)


def test_a_student_equal_to_its_teacher_starts_at_the_known_value():
    student, _ = make_views(PAIRS)
    values = [
        float(ours(preference(name), PAIRS, student, student)[0])
        for name in ("sigmoid", "hinge", "ipo", "kto_pair")
    ]
    np.testing.assert_allclose(values, [np.log(2), 1, 1 / (2 * BETA) ** 2, 0.5], rtol=1e-6)


@pytest.mark.parametrize("name", PREFERENCES)
def test_packed_pairs_equal_pairs_in_rows_of_their_own(name):
    packed = make_batch(make_row(pair(2, 3, 2), pair(3, 1, 4)))
    apart = make_batch(make_row(pair(2, 3, 2)), make_row(pair(3, 1, 4)))
    student, teacher = make_views(packed)

    def unpack(x):  # the second pair fills positions 7..14 of the packed row
        return jnp.stack([x[0], jnp.roll(x[0], -7, axis=0)])

    apart = dataclasses.replace(apart, targets=unpack(packed.targets))
    views = [View(unpack(view.hidden), view.head_w_vd) for view in (student, teacher)]
    together, *_ = ours(preference(name), packed, student, teacher)
    separate, *_ = ours(preference(name), apart, *views)
    np.testing.assert_allclose(together, separate, rtol=1e-5)


def test_a_pair_without_targets_in_one_answer_is_no_pair():
    batch = make_batch(make_row(pair(2, 3, 2), [(0, [0]), (1, [1, 1]), (2, [0])]))
    student, teacher = make_views(batch)
    assert float(ours(preference("hinge"), batch, student, teacher)[1]["preference"][1]) == 1
    chosen, rejected, valid = pair_ratios(batch, student, teacher)
    assert valid.tolist() == [[True, False, False]]
    assert not np.any(chosen[0, 1:]) and not np.any(rejected[0, 1:])


CONFIGS = {
    "next_token": ObjectiveConfig(),
    "mimic": ObjectiveConfig("mimic", 0.5, z_weight=0.1),
    "all_tokens": ObjectiveConfig("mimic", 0.5, all_tokens=True),
    "compat_mimic": ObjectiveConfig("mimic", 0.5, compat=True),
    **{name: preference(name) for name in PREFERENCES},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_uneven_micro_batches_add_up_to_the_global_batch(name):
    config = CONFIGS[name]
    batch = PAIRS if config.kind == "preference" else CHATS
    student, teacher = make_views(batch)
    teacher = teacher if config.needs_teacher else None
    totals, aux = objectives.totals(config, batch), make_aux()
    pair_means = None
    if config.kind == "preference":
        chosen, rejected, _ = pair_ratios(batch, student, teacher)
        pair_means = jnp.sum(chosen) / totals.pairs, jnp.sum(rejected) / totals.pairs

    def part(rows):
        views = [view and View(view.hidden[rows], view.head_w_vd) for view in (student, teacher)]
        return loss(config, jax.tree.map(lambda x: x[rows], batch), *views, aux, totals, pair_means)

    parts = [part(rows) for rows in (slice(0, 2), slice(2, 4))]
    added = jax.tree.leaves(jax.tree.map(lambda a, b: a + b, *parts))
    for actual, desired in zip(added, jax.tree.leaves(part(slice(0, 4))), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_without_targets_contributes_nothing(name):
    config, batch = CONFIGS[name], make_batch(make_row(), make_row())
    student, teacher = make_views(batch)
    value, metrics, gradient = ours(
        config, batch, student, teacher if config.needs_teacher else None
    )
    assert float(value) == 0 and not np.any(gradient.hidden) and not np.any(gradient.head_w_vd)
    assert all(float(total) == 0 and float(count) == 0 for total, count in metrics.values())


def test_samples_without_a_target_are_counted():
    student, _ = make_views(CHATS)
    _, metrics, _ = ours(ObjectiveConfig(), CHATS, student, None)
    assert [float(x) for x in metrics["samples_without_target"]] == [1, 5]


def test_router_losses_are_added_once_with_their_weights():
    student, _ = make_views(CHATS)
    aux, config = make_aux(), ObjectiveConfig(balance_weight=0.02, z_weight=0.3)
    totals = objectives.totals(config, CHATS)
    with_experts, metrics = loss(config, CHATS, student, None, aux, totals)
    without, _ = loss(config, CHATS, student, None, DENSE, totals)
    np.testing.assert_allclose(
        with_experts - without, 0.02 * np.sum(aux.balance) + 0.3 * np.sum(aux.z), rtol=1e-5
    )
    routed = np.sum(np.asarray(CHATS.segment_ids) > 0)
    answers = np.sum(np.asarray(CHATS.loss_weights))
    assert (routed, answers) == (20, 10), "otherwise the test could not tell the two"
    load = np.asarray(aux.load)
    wanted = {
        "balance": np.sum(aux.balance),
        "router_z": np.sum(aux.z),
        "expert_share_max": (load / load.sum(1, keepdims=True)).max(),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], (routed * value, routed), rtol=1e-6)


def test_a_micro_batch_weighs_its_router_losses_by_its_routed_tokens():
    """Not by its answers: a micro-batch of long questions routes as many tokens."""
    student, _ = make_views(CHATS)
    config = ObjectiveConfig(balance_weight=0.02, z_weight=0.3)
    totals = objectives.totals(config, CHATS)
    shares = []
    for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
        micro = jax.tree.map(lambda x, rows=rows: x[rows], CHATS)
        view = View(student.hidden[rows], student.head_w_vd)
        aux = make_aux(seed=rows.start)
        with_experts, _ = loss(config, micro, view, None, aux, totals)
        without, _ = loss(config, micro, view, None, DENSE, totals)
        own = 0.02 * np.sum(aux.balance) + 0.3 * np.sum(aux.z)
        shares.append(float(with_experts - without) / own)
    routed = np.sum(np.asarray(CHATS.segment_ids) > 0, axis=1)
    wanted = np.array([routed[0], routed[1], routed[2] + routed[3]]) / routed.sum()
    np.testing.assert_allclose(shares, wanted, rtol=1e-4)
    assert not np.any(np.asarray(CHATS.loss_weights)[1]), "the second one has no answer"


TAUGHT = {
    "mimic": ObjectiveConfig("mimic", 0.5, all_tokens=True),
    "compat": ObjectiveConfig("mimic", compat=True),
    **{name: preference(name) for name in ("sigmoid", "ipo", "kto_pair")},
}


@pytest.mark.parametrize("name", TAUGHT)
def test_the_teacher_gets_no_gradient(name):
    """Neither its hidden states nor its head; the student's both do."""
    config = TAUGHT[name]
    batch = PAIRS if config.kind == "preference" else CHATS
    totals = objectives.totals(config, batch)
    run = lambda views: loss(config, batch, *views, DENSE, totals)[0]
    student, teacher = jax.grad(run)(make_views(batch))
    assert np.any(student.hidden) and np.any(student.head_w_vd)
    assert not np.any(teacher.hidden) and not np.any(teacher.head_w_vd)


def test_compat_masks_the_divergence_by_unshifted_labels_and_reports_a_cross_entropy():
    batch = make_batch(make_row(chat(0, 0, 1, 1, 0), chat(1, 1)), make_row(chat(0, 1, 1)))
    mask = np.zeros((2, S), bool)
    # the positions of the targets themselves; a target that was cut off has none
    mask[0, [3, 4, 6]] = True
    mask[1, 2] = True
    student, teacher = make_views(batch)
    reference = Reference(student, teacher)
    value, _, gradient = ours(ObjectiveConfig("mimic", compat=True), batch, student, teacher)
    cross_entropies = [
        -(reference.teacher[r, s].exp() * reference.student[r, s]).sum()
        for r, s in np.argwhere(mask)
    ]
    reference.check(value, gradient, mean(cross_entropies))


@pytest.mark.parametrize(
    ("config", "times"),
    [(ObjectiveConfig("mimic", 0.5, compat=True), 2), (ObjectiveConfig("mimic", compat=True), 1)],
)
def test_compat_adds_the_balance_loss_twice_beside_next_token(config, times):
    student, teacher = make_views(CHATS)
    aux, totals = make_aux(), objectives.totals(config, CHATS)
    values = [loss(config, CHATS, student, teacher, a, totals)[0] for a in (aux, DENSE)]
    np.testing.assert_allclose(values[0] - values[1], times * 0.01 * np.sum(aux.balance), rtol=1e-3)


@pytest.mark.parametrize("seed", [1, 2])  # mean rejected ratio: below 0, above 0
def test_compat_differentiates_ktos_kl_over_the_batch_at_hand(seed):
    student, teacher = make_views(PAIRS, seed)
    reference = Reference(student, teacher)
    config = dataclasses.replace(preference("kto_pair"), compat=True)
    totals, pair_means = objectives.totals(config, PAIRS), (7.0, 8.0)  # compat ignores the means
    run = lambda student: loss(config, PAIRS, student, teacher, DENSE, totals, pair_means)[0]
    value, gradient = jax.jit(jax.value_and_grad(run))(student)
    chosen, rejected = ([sum(answer[i]) for answer in reference.ratios(PAIRS)] for i in (0, 1))
    chosen_terms = [1 - torch.sigmoid(BETA * (c - mean(rejected).clamp(min=0))) for c in chosen]
    rejected_terms = [1 - torch.sigmoid(BETA * (mean(chosen).clamp(min=0) - r)) for r in rejected]
    reference.check(value, gradient, mean(chosen_terms + rejected_terms))


def test_global_pair_means_replace_those_of_the_batch():
    student, teacher = make_views(PAIRS)
    config = preference("kto_pair")
    totals, pair_means = objectives.totals(config, PAIRS), (jnp.float32(0.5), jnp.float32(-3.0))
    value, _ = loss(config, PAIRS, student, teacher, DENSE, totals, pair_means)
    pairs = [
        [sum(answer).item() for answer in answers]
        for answers in Reference(student, teacher).ratios(PAIRS)
    ]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    desired = np.mean(
        [1 - sigmoid(BETA * (c - 0)) for c, _ in pairs]
        + [1 - sigmoid(BETA * (0.5 - r)) for _, r in pairs]
    )
    np.testing.assert_allclose(value, desired, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "given"), [("next_token", True), ("mimic", False), ("preference", False)]
)
def test_a_teacher_too_many_or_too_few_is_refused(kind, given):
    config = ObjectiveConfig(kind)
    student, teacher = make_views(CHATS)
    totals = objectives.totals(config, CHATS)
    with pytest.raises(ValueError, match=f"teacher: .*{kind}"):
        loss(config, CHATS, student, teacher if given else None, DENSE, totals)
