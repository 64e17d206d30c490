"""The objectives of the stages: next_token, mimic and preference.

Source: LLaVA-MoD (arXiv 2408.15881), sections 3.2 and 3.3.

Pure functions of hidden states, heads and a `Batch`. Every part of a loss is a sum over this batch
divided by a total of the global batch, so that the losses of micro-batches, rows and devices add up
to the loss of the whole. The numeric examples in the docstrings take one batch as all there is.

Axes: B rows, S positions, D width, V vocabulary, G samples per row, Lm sparse layers, E experts.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mod_jax.batch import Array, Batch
from mod_jax.config import ObjectiveConfig
from mod_jax.models.moe import MoEAux
from mod_jax.ops.vocab_losses import token_log_probs, weighted_divergence, weighted_log_probs

# values of Batch.branch_ids
CHOSEN = 1
REJECTED = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What an objective reads of a model.

    Attributes:
      hidden: f[B,S,D], hidden states after the final norm.
      head_w_vd: f32[V,D], output head.
    """

    hidden: jax.Array
    head_w_vd: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the global batch that the losses are divided by, each f32[].

    Attributes:
      tokens: Positions with a target.
      compared: Positions at which the student mimics the teacher.
      pairs: Preference pairs.
      routed: Positions that are not padding.
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


def compared_positions(config: ObjectiveConfig, batch: Batch) -> Array:
    """Positions at which the mimic objective compares distributions, f32[B,S].

    By default the positions with a target. With `all_tokens` every position that the next one
    continues, those of pictures and instructions included.

    With `compat` the mask comes from labels that were not shifted, as in the reference code: a
    position counts if its own token is a target. So the first token of an answer is never
    distilled, and the position after the last one is. One position of the reference code per sample
    is missing: the end token of a sample's last answer, which no loss needs as an input. Reading it
    would make every sample longer, with other rows for the same data.
    """
    segment, next_segment = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
    branch, next_branch = batch.branch_ids[:, :-1], batch.branch_ids[:, 1:]
    seen_by_next = (branch == 0) | (branch == next_branch)
    continues = (next_segment > 0) & (segment == next_segment) & seen_by_next
    if config.all_tokens:
        return jnp.pad(continues, ((0, 0), (0, 1))).astype(jnp.float32)
    if config.compat:
        return jnp.pad(batch.loss_weights[:, :-1] * continues, ((0, 0), (1, 0)))
    return batch.loss_weights


def pair_ratios(
    batch: Batch, student: View, teacher: View
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-ratios of both answers of each pair.

    The ratio of an answer is its log-probability under the student minus that under the teacher.

    Example: an answer of two tokens has the log-probabilities (-0.5, -1.5) under the student and
    (-1.0, -2.0) under the teacher. Its ratio is (-0.5 + 1.0) + (-1.5 + 2.0) = 1.0.

    Returns:
      chosen: f32[B,G].
      rejected: f32[B,G].
      valid: bool[B,G], True where both answers of a sample have targets; else the ratios are 0.
    """
    mask = batch.loss_weights > 0
    log_probs = token_log_probs(student.hidden, student.head_w_vd, batch.targets, mask)
    reference = token_log_probs(teacher.hidden, teacher.head_w_vd, batch.targets, mask)
    ratios = (log_probs - jax.lax.stop_gradient(reference)) * batch.loss_weights
    valid = _valid_pairs(batch)
    chosen = jnp.where(valid, _answer_sums(batch, ratios, CHOSEN), 0)
    rejected = jnp.where(valid, _answer_sums(batch, ratios, REJECTED), 0)
    return chosen, rejected, valid


def loss(
    config: ObjectiveConfig,
    batch: Batch,
    student: View,
    teacher: View | None,
    aux: MoEAux,
    totals: Totals,
    pair_means: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, dict]:
    """This batch's contribution to the loss of the global batch.

    Args:
      config: The objective.
      batch: A micro-batch, or the global batch.
      student: View of the student.
      teacher: View of the teacher, which gets no gradient; None if and only if the objective needs
        no teacher.
      aux: MoEAux of the student: balance [Lm], z [Lm], load [Lm,E]; Lm may be 0.
      totals: Totals of the global batch. A total of 0 makes its part of the loss 0.
      pair_means: For kto_pair, the mean chosen and the mean rejected ratio over the global batch;
        None if `batch` is the global batch.

    Returns:
      (loss f32[], metrics: name -> (sum f32[], count f32[])).

    Raises:
      ValueError: If a teacher is given to an objective without one, or missing.
    """
    if config.kind == "next_token" and teacher is None:
        task, metrics = _next_token(batch, student, totals)
    elif config.kind == "mimic" and teacher is not None:
        task, metrics = _mimic(config, batch, student, teacher, totals)
    elif config.kind == "preference" and teacher is not None:
        task, metrics = _preference(config, batch, student, teacher, totals, pair_means)
    else:
        given, remedy = ("None", "its View") if teacher is None else ("a View", "None")
        raise ValueError(
            f"teacher: got {given}, expected {remedy} for the objective {config.kind!r}."
        )
    router, router_metrics = _router(config, batch, aux, totals)
    metrics |= router_metrics
    metrics |= {"samples_without_target": _without_target(batch)}
    return task + router, metrics


@jax.named_scope("next_token")
def _next_token(batch: Batch, student: View, totals: Totals) -> tuple[jax.Array, dict]:
    """Mean cross-entropy of the targets.

    Example: two answer tokens with the log-probabilities -0.5 and -1.5 give a loss of
    (0.5 + 1.5) / 2 = 1.0. In a global batch with four answer tokens, a micro-batch of these two
    contributes (0.5 + 1.5) / 4 = 0.5.
    """
    task, log_probs = weighted_log_probs(
        student.hidden,
        student.head_w_vd,
        batch.targets,
        batch.loss_weights > 0,
        -_share(batch.loss_weights, totals.tokens),
    )
    cross_entropy = -jnp.sum(log_probs * batch.loss_weights)
    return task, {"next_token": (cross_entropy, jnp.sum(batch.loss_weights))}


@jax.named_scope("mimic")
def _mimic(
    config: ObjectiveConfig, batch: Batch, student: View, teacher: View, totals: Totals
) -> tuple[jax.Array, dict]:
    """Mean KL(teacher || student), plus `next_token_weight` times the next-token loss.

    Example: at one compared position the teacher's probabilities of two words are (0.5, 0.5), the
    student's (0.25, 0.75); at another both have the same. The KLs are 0.5 ln(0.5 / 0.25) +
    0.5 ln(0.5 / 0.75) = 0.1438 and 0, their mean is 0.0719. With a next-token loss of 1.0 and a
    `next_token_weight` of 0.5 the loss is 0.0719 + 0.5 * 1.0 = 0.5719.
    """
    compared = compared_positions(config, batch)
    mask = (compared > 0) | (batch.loss_weights > 0)
    task, log_probs, divergence = weighted_divergence(
        student.hidden,
        student.head_w_vd,
        teacher.hidden,
        teacher.head_w_vd,
        batch.targets,
        mask,
        -config.next_token_weight * _share(batch.loss_weights, totals.tokens),
        _share(compared, totals.compared),
        cross_entropy=config.compat,
    )
    cross_entropy = -jnp.sum(log_probs * batch.loss_weights)
    metrics = {
        "next_token": (cross_entropy, jnp.sum(batch.loss_weights)),
        "kl": (jnp.sum(divergence * compared), jnp.sum(compared)),
    }
    return task, metrics


@jax.named_scope("preference")
def _preference(
    config: ObjectiveConfig,
    batch: Batch,
    student: View,
    teacher: View,
    totals: Totals,
    pair_means: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, dict]:
    """Mean of a loss of `PREFERENCES` over the pairs."""
    chosen, rejected, valid = pair_ratios(batch, student, teacher)
    pairs = jnp.sum(valid, dtype=jnp.float32)
    if pair_means is None or config.compat:
        pair_means = _share(jnp.sum(chosen), pairs), _share(jnp.sum(rejected), pairs)
    if not config.compat:
        pair_means = jax.lax.stop_gradient(pair_means)
    chosen_length = jnp.maximum(_answer_sums(batch, batch.loss_weights, CHOSEN), 1)
    rejected_length = jnp.maximum(_answer_sums(batch, batch.loss_weights, REJECTED), 1)
    lengths = (chosen_length, rejected_length)
    losses = PREFERENCES[config.preference](config, chosen, rejected, lengths, pair_means)
    losses = jnp.where(valid, losses, 0)
    values = {
        "preference": losses,
        "reward_chosen": config.beta * chosen,
        "reward_rejected": config.beta * rejected,
        "reward_margin": config.beta * (chosen - rejected),
        "reward_accuracy": valid & (chosen > rejected),
    }
    metrics = {name: (jnp.sum(x, dtype=jnp.float32), pairs) for name, x in values.items()}
    return _share(jnp.sum(losses), totals.pairs), metrics


# The arguments of each preference loss:
#   config: beta and label_smoothing.
#   chosen, rejected: f32[B,G], log-ratios from `pair_ratios`.
#   lengths: tokens of the chosen and of the rejected answers, f32[B,G] each.
#   means: mean chosen and mean rejected log-ratio over the global batch, f32[] each.
# Each returns the loss of every pair, f32[B,G].
Pair = tuple[jax.Array, jax.Array]
PreferenceLoss = Callable[[ObjectiveConfig, jax.Array, jax.Array, Pair, Pair], jax.Array]


def _sigmoid(
    config: ObjectiveConfig, chosen: jax.Array, rejected: jax.Array, lengths: Pair, means: Pair
) -> jax.Array:
    """DPO (arXiv 2305.18290), with label smoothing.

    Example: beta = 0.1, a chosen ratio of 2 and a rejected one of -1 give the margin
    0.1 * (2 + 1) = 0.3 and the loss -ln sigmoid(0.3) = 0.5544. With a label smoothing of 0.1 it is
    0.9 * 0.5544 + 0.1 * 0.8544 = 0.5844, where -ln sigmoid(-0.3) = 0.8544.
    """
    margin = config.beta * (chosen - rejected)
    as_labelled = -(1 - config.label_smoothing) * jax.nn.log_sigmoid(margin)
    swapped = config.label_smoothing * jax.nn.log_sigmoid(-margin)
    return as_labelled - swapped


def _hinge(
    config: ObjectiveConfig, chosen: jax.Array, rejected: jax.Array, lengths: Pair, means: Pair
) -> jax.Array:
    """SLiC (arXiv 2309.06657).

    Example: beta = 0.1, a chosen ratio of 2 and a rejected one of -1 give 1 - 0.1 * (2 + 1) = 0.7.
    From a difference of 10 on the loss is 0.
    """
    return jax.nn.relu(1 - config.beta * (chosen - rejected))


def _ipo(
    config: ObjectiveConfig, chosen: jax.Array, rejected: jax.Array, lengths: Pair, means: Pair
) -> jax.Array:
    """IPO (arXiv 2310.12036) on the mean ratio of an answer's tokens, as in TRL.

    Example: beta = 0.1, a chosen ratio of 2 over 4 tokens and a rejected one of -1 over 2 tokens
    have the means 0.5 and -0.5. Their difference 1 should be 1 / (2 * 0.1) = 5, so the loss is
    (1 - 5)^2 = 16.
    """
    chosen_length, rejected_length = lengths
    difference = chosen / chosen_length - rejected / rejected_length
    return jnp.square(difference - 1 / (2 * config.beta))


def _kto_pair(
    config: ObjectiveConfig, chosen: jax.Array, rejected: jax.Array, lengths: Pair, means: Pair
) -> jax.Array:
    """KTO (arXiv 2402.01306) on pairs, which LLaVA-MoD uses.

    Each answer is compared with the mean ratio of the other kind, an estimate of the KL to the
    teacher, taken as 0 if it is negative.

    Example: beta = 0.1 and a single pair with a chosen ratio of 2 and a rejected one of -1. The
    means are 2 and -1, so the estimates are 2 and 0. The chosen answer gives
    1 - sigmoid(0.1 * (2 - 0)) = 0.4502, the rejected one 1 - sigmoid(0.1 * (2 + 1)) = 0.4256, and
    the loss is their mean 0.4379.
    """
    kl_chosen, kl_rejected = (jnp.maximum(mean, 0) for mean in means)
    chosen_loss = 1 - jax.nn.sigmoid(config.beta * (chosen - kl_rejected))
    rejected_loss = 1 - jax.nn.sigmoid(config.beta * (kl_chosen - rejected))
    return (chosen_loss + rejected_loss) / 2


PREFERENCES: dict[str, PreferenceLoss] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "kto_pair": _kto_pair,
}


@jax.named_scope("balance")
def _router(
    config: ObjectiveConfig, batch: Batch, aux: MoEAux, totals: Totals
) -> tuple[jax.Array, dict]:
    """Balance loss and z-loss, each summed over the sparse layers and weighted.

    Both are means over the tokens of this batch, so its contribution is weighted by its share of
    the routed tokens. The metric `expert_share_max` is the largest share of (token, choice) pairs
    that any expert of any layer processes.

    Example: two sparse layers with the balance losses 1.4 and 1.0 and the z-losses 0.5 and 0.7, a
    `balance_weight` of 0.01 and a `z_weight` of 0.001 give 0.01 * 2.4 + 0.001 * 1.2 = 0.0252. If
    the micro-batch holds 30 of the 120 routed tokens of the global batch, it contributes
    0.0252 * 30 / 120 = 0.0063. (`models.moe.report` has examples of both losses.)
    """
    routed = jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)
    balance = jnp.sum(aux.balance)
    z = jnp.sum(aux.z)
    # The reference code adds the balance loss to each of its two terms when it mimics and predicts
    # tokens at once.
    twice = config.compat and config.kind == "mimic" and config.next_token_weight > 0
    weighted = (2 if twice else 1) * config.balance_weight * balance + config.z_weight * z
    if aux.balance.size == 0:
        return weighted, {}
    shares = aux.load / jnp.maximum(jnp.sum(aux.load, axis=-1, keepdims=True), 1)
    means = {"balance": balance, "router_z": z, "expert_share_max": jnp.max(shares)}
    metrics = {name: (routed * x, routed) for name, x in means.items()}
    return _share(routed * weighted, totals.routed), metrics


def _members(batch: Batch) -> jax.Array:
    """bool[B,S,G], whether position s belongs to sample g of its row."""
    return batch.segment_ids[:, :, None] == jnp.arange(1, batch.samples.shape[1] + 1)


def _answer_sums(batch: Batch, x_bs: Array, branch: int) -> jax.Array:
    """f32[B,G], the sum of `x_bs` over the positions of one branch of each sample."""
    answer = _members(batch) & (batch.branch_ids == branch)[:, :, None]
    return jnp.sum(jnp.where(answer, x_bs[:, :, None], 0), axis=1)


def _valid_pairs(batch: Batch) -> jax.Array:
    """bool[B,G], whether both answers of a sample have targets."""
    chosen = _answer_sums(batch, batch.loss_weights, CHOSEN)
    return (chosen > 0) & (_answer_sums(batch, batch.loss_weights, REJECTED) > 0)


def _without_target(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(number of samples without a target, number of samples), each f32[]."""
    targets = jnp.sum(jnp.where(_members(batch), batch.loss_weights[:, :, None], 0), axis=1)
    present = jnp.any(_members(batch), axis=1)
    without = present & (targets == 0)
    return jnp.sum(without, dtype=jnp.float32), jnp.sum(present, dtype=jnp.float32)


def _share(part: Array, total: jax.Array) -> jax.Array:
    """part / total. Totals are counts, and if a total is 0 its part is 0 too."""
    return jnp.divide(part, jnp.maximum(total, 1))
