"""The FLOPs per second of this machine that utilisation is measured by."""

import time

import jax
import jax.numpy as jnp

ROUNDS = 8


def peak_flops(dtype: str, devices: int = 1) -> float:
    """FLOPs per second of a large matrix product, the best of several, on so many devices.

    It is below the figure that a maker gives for a device: pass that one where it is known. The
    devices of a CPU count once, because they share its cores.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b).lower(x, x).compile()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - start)
    return (1 if on_cpu else devices) * 2 * size**3 / min(seconds)
