"""Floating-point operations that a train step needs, counted from shapes; nothing is run.

A product of matrices takes two operations for each weight and position. What is counted is what the
result needs, not what a program does:

  * forward: every weight of student, teacher and tower once, of experts those that are chosen;
  * backward: as much again for the gradient of what flows in, if anything below trains, and as much
    again for the gradient of a weight that trains. So a position costs a student of N weights 6 N
    if all of it trains, 4 N where nothing but the adaptor does, and a teacher 2 N;
  * heads: at the positions that a loss reads, alone;
  * attention, counted apart: the products of queries, keys and values over the pairs of positions
    that see each other.

Padding, recomputation (remat), norms, softmax and the optimizer count nothing.
"""

import math
from collections.abc import Collection

import numpy as np

from mod_jax import objectives
from mod_jax.batch import Batch
from mod_jax.config import ModelConfig, ObjectiveConfig
from mod_jax.interop.hf_config import CLASS_TOKENS
from mod_jax.models import llava
from mod_jax.ops.visibility import visible

# Parts of a model from bottom to top: prefixes of their parameters' names.
PARTS = (
    "vision_tower.",
    "adaptor.linear_1.",
    "adaptor.linear_2.",
    "language_model.embedding.",
    "language_model.layers.",
    "language_model.norm.",
    "language_model.head.",
)
LAYERS = PARTS.index("language_model.layers.")
HEAD = PARTS.index("language_model.head.")


def of_step(
    objective: ObjectiveConfig,
    student: ModelConfig,
    teacher: ModelConfig | None,
    trained: Collection[str],
    batch: Batch,
) -> dict[str, float]:
    """Operations of one step: {"dense": products with weights, "attention": the rest}.

    Args:
      objective: What is minimised.
      student, teacher: The models; None without a teacher.
      trained: Names of the student's parameters that train.
      batch: The global batch.
    """
    read = np.asarray(batch.loss_weights) > 0
    if objective.kind == "mimic":
        read |= np.asarray(objectives.compared_positions(objective, batch)) > 0
    counts = {
        "positions": int(np.sum(np.asarray(batch.segment_ids) > 0)),
        "pictures": int(np.sum(np.asarray(batch.picture_index) >= 0)) / student.vision.num_features,
        "read": int(read.sum()),
        "pairs": int(np.sum(visible(batch.segment_ids, batch.branch_ids))),
    }
    dense, attention = _of_model(student, trained, counts, with_tower=True)
    if teacher is not None:
        more = _of_model(teacher, (), counts, with_tower=False)
        dense, attention = dense + more[0], attention + more[1]
    return {"dense": dense, "attention": attention}


def _of_model(
    config: ModelConfig, trained: Collection[str], counts: dict, with_tower: bool
) -> tuple[float, float]:
    """(operations of products with weights, of attention) of one model."""
    shapes = llava.abstract(config)
    lowest = min((_part(name) for name in trained), default=len(PARTS))
    dense = 0.0
    for name, shape in shapes.items():
        leaf = name.rpartition(".")[2]
        part = _part(name)
        if not leaf.startswith("w_") or leaf in ("w_vd", "w_td") or (part == 0 and not with_tower):
            continue
        products = 2 * math.prod(shape.shape) * _uses(name, config, counts)
        dense += products * _passes(part, lowest, name in trained)
    words, width = config.decoder.vocab_size, config.decoder.hidden_size
    head = PARTS[3 if config.decoder.tie_embeddings else HEAD] + "w_vd"
    dense += 2 * words * width * counts["read"] * _passes(HEAD, lowest, head in trained)

    decoder, tower = config.decoder, config.vision
    # two products, of two operations for each number of a head
    a_pair = 4 * decoder.num_layers * decoder.num_heads * decoder.head_dim
    # backward, each of the products has two gradients
    attention = a_pair * counts["pairs"] * (3 if lowest <= LAYERS else 1)
    if with_tower:
        length = tower.num_features + CLASS_TOKENS[tower.family]
        a_pair = 4 * _tower_layers(config) * tower.hidden_size
        attention += a_pair * length**2 * counts["pictures"] * (3 if lowest == 0 else 1)
    return dense, attention


def _part(name: str) -> int:
    return next(number for number, prefix in enumerate(PARTS) if name.startswith(prefix))


def _passes(part: int, lowest: int, trains: bool) -> int:
    """How often the products of a part are made: forward, for what flows in, for the weight."""
    has_layers = part in (0, LAYERS)  # below one of their products lie others of the same part
    reached = lowest < part or (has_layers and lowest == part)
    return 1 + reached + trains


def _uses(name: str, config: ModelConfig, counts: dict) -> float:
    """How often a weight is multiplied with something in a forward pass."""
    tower = config.vision
    if name.startswith("vision_tower.layers."):
        length = tower.num_features + CLASS_TOKENS[tower.family]
        return counts["pictures"] * length * _tower_layers(config) / tower.num_layers
    if name.startswith(("vision_tower.", "adaptor.")):
        return counts["pictures"] * tower.num_features
    moe = config.decoder.moe
    share = moe.experts_per_token / moe.num_experts if moe and ".moe.experts." in name else 1
    return counts["positions"] * share


def _tower_layers(config: ModelConfig) -> int:
    """The layers of the tower that are run: those above the features are not."""
    return config.vision.num_layers + 1 + config.vision.feature_layer
