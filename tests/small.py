"""Small models and packed batches for the tests of training."""

import functools

import numpy as np

from mod_jax.batch import Batch
from mod_jax.config import DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from mod_jax.data.batches.packing import Room, to_batch
from mod_jax.data.samples.sample import Sample
from mod_jax.data.samples.tokens import Tokens
from mod_jax.models import llava

IMAGE_SIZE, FEATURES, LENGTH, PICTURES = 8, 4, 32, 2
VISION = VisionConfig(
    image_size=IMAGE_SIZE,
    patch_size=4,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
)
DECODER = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rope_theta": 1e4,
}
IDS = {"image_token_id": 1, "end_token_id": 0}  # those of the scenes' tokenizer

DENSE = ModelConfig(VISION, DecoderConfig(**DECODER), **IDS)
SPARSE = ModelConfig(VISION, DecoderConfig(**DECODER, moe=MoEConfig()), **IDS)
TEACHER = ModelConfig(
    VISION, DecoderConfig(**DECODER | {"vocab_size": 96, "hidden_size": 48}), **IDS
)  # wider than the students, and its vocabulary is padded further


@functools.cache
def params_of(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters, biases and norms included: one that is ignored changes results."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, abstract in llava.abstract(config).items():
        centre = 1.0 if name.endswith(("scale_d", "scale_h")) else 0.0
        params[name] = (centre + 0.2 * rng.normal(size=abstract.shape)).astype(abstract.dtype)
    return params


def sample(
    rng: np.random.Generator, number: int, pictures: int, question: int, *answers: int
) -> Sample:
    """A random chat (one answer) or preference pair (two), pictures first.

    Args:
      rng: source of tokens and pictures.
      number: of the sample in its source.
      pictures: number of pictures.
      question: number of the tokens between pictures and answers.
      *answers: number of tokens of each answer.
    """
    prefix = pictures * FEATURES + question
    length = prefix + sum(answers)
    is_picture = np.arange(length) < pictures * FEATURES
    branches = [0, 1, 2] if len(answers) == 2 else [0, 0]
    tokens = Tokens(
        tokens=np.where(is_picture, IDS["image_token_id"], rng.integers(2, 80, length)).astype(
            np.int32
        ),
        targets=rng.integers(2, 80, length).astype(np.int32),
        loss_weights=(np.arange(length) >= prefix).astype(np.float32),
        positions=np.concatenate(
            [np.arange(prefix), *(prefix + np.arange(n) for n in answers)]
        ).astype(np.int32),
        branch_ids=np.repeat(branches, [prefix, *answers]).astype(np.int32),
        is_picture=is_picture,
        num_pictures=pictures,
        truncated=False,
    )
    return Sample(
        tokens, rng.integers(0, 256, (pictures, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), number
    )


def batch_of(rows: list[list[Sample]]) -> Batch:
    """Packs rows of at most two samples each."""
    return to_batch(rows, Room(LENGTH, PICTURES, 2), IMAGE_SIZE, IDS["end_token_id"])


def chats(rows: int = 8, seed: int = 0) -> Batch:
    """A batch of two chats per row, with one picture or none and answers of uneven length.

    The last row holds a single chat that has no target.
    """
    rng = np.random.default_rng(seed)
    packed = [
        [sample(rng, 2 * b + g, int(rng.integers(2)), 3, int(rng.integers(1, 9))) for g in range(2)]
        for b in range(rows - 1)
    ]
    return batch_of([*packed, [sample(rng, 2 * rows, 1, 3, 0)]])


def pairs(rows: int = 8, seed: int = 0) -> Batch:
    """A batch of two preference pairs per row, the second about a picture; the last row has one."""
    rng = np.random.default_rng(seed)
    packed = [
        [sample(rng, 2 * b + g, g, 2, *map(int, rng.integers(1, 6, 2))) for g in range(2)]
        for b in range(rows)
    ]
    return batch_of([*packed[:-1], packed[-1][:1]])
