"""Time and memory of single operations: python -m benchmarks.ops --preset=real-vocab

Each is measured forward, and forward with the gradients that a step takes. The vocabulary losses
compute 1024 positions, the others the positions of a step. FLOPs are those of the products of
matrices that the result needs, and of attention those of all pairs of positions.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import measure
from benchmarks.setting import DTYPE, JSON, PRESET, STEPS, WARMUP, run
from benchmarks.sizes import LOSS_ROWS, PRESETS, TEACHER_WIDTH, Sizes
from mod_jax.config import MoEConfig
from mod_jax.ops.attention import attention
from mod_jax.ops.expert_exchange import expert_layer
from mod_jax.ops.vocab_losses import token_log_probs, weighted_divergence


class Operation(NamedTuple):
    """An operation and its arguments.

    Attributes:
      run: (trained, read) -> array. Gradients are taken of its sum, with respect to `trained`.
      trained: Arrays.
      read: Arrays.
      flops: Of the forward pass.
      backward: FLOPs of the gradients, as a multiple of these.
    """

    run: Callable
    trained: tuple
    read: tuple
    flops: float
    backward: float


def _normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)


def _divergence(sizes: Sizes, dtype: str) -> Operation:
    width, wide = sizes.width, TEACHER_WIDTH * sizes.width
    hidden = _normal(0, 1, LOSS_ROWS, width).astype(dtype)
    teacher = _normal(1, 1, LOSS_ROWS, wide).astype(dtype)
    head = _normal(2, sizes.words, width, scale=width**-0.5)
    teacher_head = _normal(3, sizes.words, wide, scale=wide**-0.5)
    targets = jnp.zeros((1, LOSS_ROWS), jnp.int32)

    def run(trained, read):
        (hidden,), (head, teacher, teacher_head) = trained, read
        mask = jnp.ones_like(targets, bool)
        mean = jnp.full(targets.shape, 1 / LOSS_ROWS)
        sides = (hidden, head, teacher, teacher_head)
        return weighted_divergence(*sides, targets, mask, jnp.zeros_like(mean), mean)[0]

    flops = 2 * LOSS_ROWS * sizes.words * (width + wide)
    return Operation(run, (hidden,), (head, teacher, teacher_head), flops, width / (width + wide))


def _log_probs(sizes: Sizes, dtype: str) -> Operation:
    hidden = _normal(0, 1, LOSS_ROWS, sizes.width).astype(dtype)
    head = _normal(2, sizes.words, sizes.width, scale=sizes.width**-0.5)
    targets = jnp.zeros((1, LOSS_ROWS), jnp.int32)

    def run(trained, read):
        return token_log_probs(trained[0], read[0], targets, jnp.ones_like(targets, bool))

    return Operation(run, (hidden,), (head,), 2 * LOSS_ROWS * sizes.words * sizes.width, 1)


def _attention(sizes: Sizes, dtype: str) -> Operation:
    size = sizes.width // sizes.heads
    rows = (sizes.samples, sizes.positions)
    query = _normal(0, *rows, sizes.heads, size).astype(dtype)
    key = _normal(1, *rows, sizes.kv_heads, size).astype(dtype)
    value = _normal(2, *rows, sizes.kv_heads, size).astype(dtype)
    segments = jnp.ones(rows, jnp.int32)

    def run(trained, read):
        return attention(*trained, read[0], jnp.zeros_like(read[0]))

    flops = 4 * sizes.samples * sizes.positions**2 * sizes.width
    return Operation(run, (query, key, value), (segments,), flops, 2)


def _experts(sizes: Sizes, dtype: str) -> Operation:
    moe = MoEConfig()
    experts, chosen = moe.num_experts, moe.experts_per_token
    rows = (sizes.samples, sizes.positions)
    x = _normal(0, *rows, sizes.width).astype(dtype)
    weights = tuple(
        _normal(seed, experts, *shape, scale=shape[0] ** -0.5)
        for seed, shape in enumerate(
            2 * [(sizes.width, sizes.inner)] + [(sizes.inner, sizes.width)]
        )
    )
    _, choices = jax.lax.top_k(_normal(4, *rows, experts), chosen)

    def run(trained, read):
        x, *weights = trained
        return expert_layer(x, read[0], jnp.full(read[0].shape, 1 / chosen), *weights)

    flops = 2 * sizes.samples * sizes.positions * chosen * 3 * sizes.width * sizes.inner
    return Operation(run, (x, *weights), (choices,), flops, 2)


OPERATIONS = {
    "divergence": _divergence,
    "log_probs": _log_probs,
    "attention": _attention,
    "experts": _experts,
}
OPERATION = flags.DEFINE_multi_enum(
    "op", list(OPERATIONS), OPERATIONS, "The operations; by default all."
)


def measured(operation: Operation, warmup: int, steps: int) -> dict:
    """Runs an operation forward, and forward and backward.

    Returns:
      "forward" and "step" -> what `measure.repeat` returns, compilation_seconds, and
      flops_per_second.
    """

    def total(trained, read):
        return jnp.mean(operation.run(trained, read).astype(jnp.float32))

    def way(function: Callable, needed: float) -> dict:
        arguments = jax.block_until_ready((operation.trained, operation.read))
        start = time.perf_counter()
        program = jax.jit(function).lower(*arguments).compile()
        compilation = time.perf_counter() - start
        found = measure.repeat(lambda: jax.block_until_ready(program(*arguments)), warmup, steps)
        rate = needed / found["seconds"]
        return found | {"compilation_seconds": compilation, "flops_per_second": rate}

    return {
        "forward": way(operation.run, operation.flops),
        "step": way(jax.value_and_grad(total), operation.flops * (1 + operation.backward)),
    }


def main(_) -> None:
    about = {
        "side": "project",
        "preset": PRESET.value,
        "dtype": DTYPE.value,
        "device": jax.devices()[0].device_kind,
    }
    found = {
        name: measured(
            OPERATIONS[name](PRESETS[PRESET.value], DTYPE.value), WARMUP.value, STEPS.value
        )
        for name in OPERATION.value
    }
    measure.report(about | found, JSON.value)


if __name__ == "__main__":
    run(main)
