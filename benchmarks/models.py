"""The presets of `benchmarks.sizes` in this project's configurations, and their batch."""

import numpy as np

from benchmarks.sizes import (
    BALANCE_WEIGHT,
    BETA,
    END_TOKEN,
    PICTURE_TOKEN,
    TEACHER_WIDTH,
    Samples,
    Sizes,
)
from mod_jax.batch import Batch
from mod_jax.config import (
    DataConfig,
    DecoderConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    SourceConfig,
    StageConfig,
    VisionConfig,
)
from mod_jax.objectives import CHOSEN, REJECTED

TRAINS = ("language_model.layers.moe.*", "adaptor.*")
MULTIPLE = 8  # of the positions of a row
OBJECTIVES = {
    "mimic": ObjectiveConfig("mimic", next_token_weight=1.0, balance_weight=BALANCE_WEIGHT),
    "preference": ObjectiveConfig(
        "preference", preference="kto_pair", beta=BETA, balance_weight=BALANCE_WEIGHT
    ),
}


def stage(work: str, rows: int, trains: tuple[str, ...] = TRAINS) -> StageConfig:
    """A stage of a thousand steps that trains parts of a student."""
    data = DataConfig((SourceConfig(),))
    return StageConfig(trains, OBJECTIVES[work], data, steps=1000, rows=rows)


def student(sizes: Sizes, **options) -> ModelConfig:
    """The sparse student; `options` are further keys of ModelConfig."""
    return _model(sizes, 1, MoEConfig(num_experts=sizes.experts), options)


def teacher(sizes: Sizes, **options) -> ModelConfig:
    """The dense teacher, wider than the student."""
    return _model(sizes, TEACHER_WIDTH, None, options)


def _model(sizes: Sizes, scale: int, moe: MoEConfig | None, options: dict) -> ModelConfig:
    vision = VisionConfig(
        image_size=sizes.image_size,
        patch_size=sizes.patch,
        hidden_size=sizes.tower_width,
        intermediate_size=sizes.tower_inner,
        num_layers=sizes.tower_layers,
        num_heads=sizes.tower_heads,
    )
    decoder = DecoderConfig(
        vocab_size=sizes.words,
        hidden_size=scale * sizes.width,
        intermediate_size=scale * sizes.inner,
        num_layers=sizes.layers,
        num_heads=scale * sizes.heads,
        num_kv_heads=scale * sizes.kv_heads,
        head_dim=sizes.width // sizes.heads,
        tie_embeddings=scale == 1,
        moe=moe,
    )
    return ModelConfig(vision, decoder, PICTURE_TOKEN, END_TOKEN, **options)


def batch(work: str, samples: Samples) -> Batch:
    """The batch of a step, a sample per row.

    A chat is the question with its first answer, the last token included: the authors compare
    distributions there too (`ObjectiveConfig.compat`). A pair shares its question. A position has
    one target, so each answer begins with a copy of the question's last token.
    """
    questions, answers, _ = samples
    rows, number, length = answers.shape
    if work == "mimic":
        asked = questions.shape[1]
        tokens = np.concatenate([questions, answers[:, 0]], 1)
        targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=END_TOKEN)
        positions = branches = np.arange(tokens.shape[1])
        branches = np.zeros_like(positions)
        weights = (positions >= asked - 1) & (positions < tokens.shape[1] - 1)
    else:
        last = np.broadcast_to(questions[:, None, -1:], (rows, number, 1))
        inputs = np.concatenate([last, answers[:, :, :-1]], 2).reshape(rows, -1)
        tokens = np.concatenate([questions[:, :-1], inputs], 1)
        shared = questions.shape[1] - 1
        targets = np.concatenate([questions[:, 1:], answers.reshape(rows, -1)], 1)
        of_answers = shared + np.tile(np.arange(length), number)
        positions = np.concatenate([np.arange(shared), of_answers])
        branches = np.repeat([0, CHOSEN, REJECTED], [shared, length, length])
        weights = branches > 0
    padding = -tokens.shape[1] % MULTIPLE

    def padded(x: np.ndarray, dtype=np.int32, fill: int = 0) -> np.ndarray:
        x = np.broadcast_to(x, tokens.shape).astype(dtype)
        return np.pad(x, ((0, 0), (0, padding)), constant_values=fill)

    is_picture = tokens == PICTURE_TOKEN
    return Batch(
        tokens=padded(tokens, fill=END_TOKEN),
        targets=padded(targets, fill=END_TOKEN),
        loss_weights=padded(weights, np.float32),
        positions=padded(positions),
        segment_ids=padded(np.ones((), np.int32)),
        branch_ids=padded(branches),
        picture_index=padded(np.where(is_picture, np.cumsum(is_picture, 1) - 1, -1), fill=-1),
        images=samples.images[:, None],
        samples=np.arange(rows, dtype=np.int32)[:, None],
    )
