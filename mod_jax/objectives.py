"""What a stage minimises: next_token, mimic and preference (arXiv 2408.15881, sections 3.2 and 3.3).

Pure functions of hidden states, heads and a Batch. Every part of a loss is a sum over this batch divided by a total of the
global batch, so the losses of micro-batches, rows and devices add up to the loss of the whole.

Axes: B rows, S positions, D width, V vocabulary, G samples a row, Lm sparse layers, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mod_jax.batch import Batch
from mod_jax.config import ObjectiveConfig
from mod_jax.ops.vocab_losses import token_divergence, token_log_probs

CHOSEN, REJECTED = 1, 2  # branch_ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What an objective sees of a model: hidden f[B,S,D] after the last norm, and head_w_vd f32[V,D]."""

    hidden: jax.Array
    head_w_vd: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the global batch that losses are divided by, each f32[].

    Attributes:
      tokens: positions with a target.
      compared: positions where the student mimics the teacher.
      pairs: preference pairs.
      routed: positions that are not padding.
    """

    tokens: jax.Array
    compared: jax.Array
    pairs: jax.Array
    routed: jax.Array


def totals(config: ObjectiveConfig, batch: Batch) -> Totals:
    """The totals of a batch; those of micro-batches add up to those of the whole."""
    counted = (
        batch.loss_weights,
        compared_positions(config, batch),
        _valid_pairs(batch),
        batch.segment_ids > 0,
    )
    return Totals(*(jnp.sum(x, dtype=jnp.float32) for x in counted))


def compared_positions(config: ObjectiveConfig, batch: Batch) -> jax.Array:
    """Where the mimic objective compares distributions, f32[B,S].

    The positions with a target; under `all_tokens` every position that the next one continues, picture and instruction included.
    Under `compat` the mask comes from unshifted labels: a position counts if its own token is a target (method: the first token
    of an answer is never distilled, and the position after its last one is).
    """
    seen_by_next = (batch.branch_ids[:, :-1] == 0) | (
        batch.branch_ids[:, :-1] == batch.branch_ids[:, 1:]
    )
    continues = (
        (batch.segment_ids[:, 1:] > 0)
        & (batch.segment_ids[:, :-1] == batch.segment_ids[:, 1:])
        & seen_by_next
    )
    if config.all_tokens:
        return jnp.pad(continues, ((0, 0), (0, 1))).astype(jnp.float32)
    if config.compat:
        return jnp.pad(batch.loss_weights[:, :-1] * continues, ((0, 0), (1, 0)))
    return batch.loss_weights


def pair_ratios(
    batch: Batch, student: View, teacher: View
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Summed log-probability of both answers of each pair, student minus teacher.

    Returns:
      (chosen f32[B,G], rejected f32[B,G], valid bool[B,G]): valid where both answers of a sample have targets, else all are 0.
    """
    mask = batch.loss_weights > 0
    log_probs = token_log_probs(student.hidden, student.head_w_vd, batch.targets, mask)
    reference = jax.lax.stop_gradient(
        token_log_probs(teacher.hidden, teacher.head_w_vd, batch.targets, mask)
    )
    ratios, valid = (log_probs - reference) * batch.loss_weights, _valid_pairs(batch)
    return *(
        jnp.where(valid, _answer_sums(batch, ratios, branch), 0) for branch in (CHOSEN, REJECTED)
    ), valid


def loss(
    config: ObjectiveConfig,
    batch: Batch,
    student: View,
    teacher: View | None,
    aux,
    totals: Totals,
    pair_means: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, dict]:
    """This batch's contribution to the loss of the global batch.

    Args:
      teacher: None exactly where the objective needs none; it gets no gradient.
      aux: MoEAux of the student: balance [Lm], z [Lm], load [Lm,E] (Lm may be 0).
      totals: of the global batch. A total of 0 makes its part 0.
      pair_means: (mean chosen ratio, mean rejected ratio) over the global batch, for kto_pair; None: `batch` is all of it.
    Returns:
      (f32[], metrics: name -> (sum f32[], count f32[])).
    Raises:
      ValueError: for a teacher too many or too few.
    """
    if config.needs_teacher != (teacher is not None):
        given, remedy = ("one", "pass None") if teacher else ("None", "pass its View")
        raise ValueError(
            f"teacher: got {given}, but objective {config.kind!r} needs {'one' if config.needs_teacher else 'none'}; {remedy}."
        )
    parts = {"next_token": _next_token, "mimic": _mimic, "preference": _preference}
    task, metrics = parts[config.kind](config, batch, student, teacher, totals, pair_means)
    router, router_metrics = _router(config, batch, aux, totals)
    return task + router, metrics | router_metrics | {
        "samples_without_target": _without_target(batch)
    }


def _next_token(config, batch, student, teacher, totals, pair_means):
    log_probs = token_log_probs(
        student.hidden, student.head_w_vd, batch.targets, batch.loss_weights > 0
    )
    surprise = -jnp.sum(log_probs * batch.loss_weights)
    return _share(surprise, totals.tokens), {"next_token": (surprise, jnp.sum(batch.loss_weights))}


def _mimic(config, batch, student, teacher, totals, pair_means):
    compared = compared_positions(config, batch)
    mask = (compared > 0) | (batch.loss_weights > 0)
    log_probs, divergence = token_divergence(
        student.hidden,
        student.head_w_vd,
        teacher.hidden,
        teacher.head_w_vd,
        batch.targets,
        mask,
        cross_entropy=config.compat,
    )
    surprise, divergence = -jnp.sum(log_probs * batch.loss_weights), jnp.sum(divergence * compared)
    metrics = {
        "next_token": (surprise, jnp.sum(batch.loss_weights)),
        "kl": (divergence, jnp.sum(compared)),
    }
    return _share(divergence, totals.compared) + config.next_token_weight * _share(
        surprise, totals.tokens
    ), metrics


def _preference(config, batch, student, teacher, totals, pair_means):
    chosen, rejected, valid = pair_ratios(batch, student, teacher)
    pairs = jnp.sum(valid, dtype=jnp.float32)
    if pair_means is None or config.compat:
        pair_means = _share(jnp.sum(chosen), pairs), _share(jnp.sum(rejected), pairs)
    if not config.compat:
        pair_means = jax.lax.stop_gradient(pair_means)
    lengths = [
        jnp.maximum(_answer_sums(batch, batch.loss_weights, branch), 1)
        for branch in (CHOSEN, REJECTED)
    ]
    losses = jnp.where(
        valid, PREFERENCES[config.preference](config, chosen, rejected, lengths, pair_means), 0
    )
    sums = {
        "preference": losses,
        "reward_chosen": config.beta * chosen,
        "reward_rejected": config.beta * rejected,
        "reward_margin": config.beta * (chosen - rejected),
        "reward_accuracy": valid & (chosen > rejected),
    }
    metrics = {name: (jnp.sum(x, dtype=jnp.float32), pairs) for name, x in sums.items()}
    return _share(jnp.sum(losses), totals.pairs), metrics


def _sigmoid(config, chosen, rejected, lengths, means):
    """DPO (arXiv 2305.18290), with label smoothing."""
    margin = config.beta * (chosen - rejected)
    return -(1 - config.label_smoothing) * jax.nn.log_sigmoid(
        margin
    ) - config.label_smoothing * jax.nn.log_sigmoid(-margin)


def _hinge(config, chosen, rejected, lengths, means):
    """SLiC (arXiv 2309.06657)."""
    return jax.nn.relu(1 - config.beta * (chosen - rejected))


def _ipo(config, chosen, rejected, lengths, means):
    """IPO (arXiv 2310.12036) on the ratios' means over an answer's tokens, as in TRL."""
    return jnp.square(chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * config.beta))


def _kto_pair(config, chosen, rejected, lengths, means):
    """KTO (arXiv 2402.01306) on pairs, the paper's choice: each answer against the other kind's mean ratio."""
    kl_chosen, kl_rejected = (jnp.maximum(mean, 0) for mean in means)
    terms = (
        1 - jax.nn.sigmoid(config.beta * (chosen - kl_rejected)),
        1 - jax.nn.sigmoid(config.beta * (kl_chosen - rejected)),
    )
    return sum(terms) / 2


PREFERENCES = {"sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo, "kto_pair": _kto_pair}


def _router(config, batch, aux, totals):
    """Balance and z losses, weighted by this batch's share of the routed tokens, and the largest share of tokens an expert gets."""
    routed = jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)
    balance, z = jnp.sum(aux.balance), jnp.sum(aux.z)
    # compat: the reference adds the balance loss to both of its terms when it mimics and predicts tokens at once.
    times = 2 if config.compat and config.kind == "mimic" and config.next_token_weight > 0 else 1
    weighted = times * config.balance_weight * balance + config.z_weight * z
    if aux.balance.size == 0:
        return weighted, {}
    shares = aux.load / jnp.maximum(jnp.sum(aux.load, axis=-1, keepdims=True), 1)
    means = {"balance": balance, "router_z": z, "expert_share_max": jnp.max(shares)}
    return _share(routed * weighted, totals.routed), {
        name: (routed * x, routed) for name, x in means.items()
    }


def _members(batch) -> jax.Array:
    """bool[B,S,G]: position s belongs to the row's sample g."""
    return batch.segment_ids[:, :, None] == jnp.arange(1, batch.samples.shape[1] + 1)


def _answer_sums(batch, x_bs, branch) -> jax.Array:
    """f32[B,G]: the sum of x over the positions of one branch of each sample."""
    answer = _members(batch) & (batch.branch_ids == branch)[:, :, None]
    return jnp.sum(jnp.where(answer, x_bs[:, :, None], 0), axis=1)


def _valid_pairs(batch) -> jax.Array:
    return (_answer_sums(batch, batch.loss_weights, CHOSEN) > 0) & (
        _answer_sums(batch, batch.loss_weights, REJECTED) > 0
    )


def _without_target(batch) -> tuple[jax.Array, jax.Array]:
    targets = jnp.sum(jnp.where(_members(batch), batch.loss_weights[:, :, None], 0), axis=1)
    present = jnp.any(_members(batch), axis=1)
    return jnp.sum(present & (targets == 0), dtype=jnp.float32), jnp.sum(present, dtype=jnp.float32)


def _share(part, total) -> jax.Array:
    """part / total; totals are counts, and a total of 0 has parts of 0."""
    return part / jnp.maximum(total, 1)
