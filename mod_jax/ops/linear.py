"""Products with float32 weights and sums with float32 biases, under activations of any dtype.

They compute in the dtype of the activations, but a gradient of a weight or bias is summed in
float32, over positions and over devices. Autodiff would sum the gradient of the weight as it is
cast for the product: in bfloat16, where a term below 1/256 of the sum so far is lost.

Axes: D inputs, F outputs; either may be several dimensions (heads and their size).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def linear(x: jax.Array, w: jax.Array, inputs: int = 1) -> jax.Array:
    """Multiplies the last dimensions of `x` with the first ones of a weight.

    Args:
      x: f[..., D].
      w: f32[D, F], cast to the dtype of `x` for the product.
      inputs: Number of dimensions of D.

    Returns:
      f[..., F] in the dtype of `x`.
    """
    # equivalent to: jnp.tensordot(x, w.astype(x.dtype), inputs)
    return _linear(inputs, x, w)


def add(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias.

    Args:
      x: f[..., F].
      bias: f32[F], or anything that broadcasts to `x`.

    Returns:
      f[..., F] in the dtype of `x`.
    """
    # equivalent to: x + bias.astype(x.dtype). Broadcast first, and the transpose sums last.
    if x.dtype == bias.dtype:
        return x + bias
    return x + jnp.broadcast_to(bias, x.shape).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(inputs: int, x: jax.Array, w: jax.Array) -> jax.Array:
    letters = "zyxwv"[: w.ndim]
    contracted, outputs = letters[:inputs], letters[inputs:]
    return jnp.einsum(f"...{contracted},{letters}->...{outputs}", x, w.astype(x.dtype))


def _forward(inputs: int, x, w):
    """Saves what the gradients need that are asked for: of a frozen weight none, so no `x`."""
    y = _linear(inputs, x.value, w.value)
    dtype = jnp.zeros((), w.value.dtype)  # what is saved has to be an array
    w_saved = w.value.astype(x.value.dtype) if x.perturbed else None
    return y, (x.value if w.perturbed else None, w_saved, dtype)


def _backward(inputs: int, saved: tuple, dy: jax.Array | SymbolicZero):
    if isinstance(dy, SymbolicZero):
        return None, None
    x, w, dtype = saved
    dx = dw = None
    if w is not None:
        in_w = tuple(range(inputs, w.ndim))
        dx = jnp.tensordot(dy, w, (tuple(range(dy.ndim - len(in_w), dy.ndim)), in_w))
    if x is not None:
        # As one product of matrices, x first: XLA on CPU takes it as it is. What autodiff would
        # write, it computes from a transposed copy of `dy`, which takes longer than the product.
        rows = x.shape[: x.ndim - inputs]
        x_nd, dy_nf = (a.reshape(math.prod(rows), -1) for a in (x, dy))
        dw = jnp.einsum("nd,nf->df", x_nd, dy_nf, preferred_element_type=jnp.float32)
        dw = dw.reshape(*x.shape[len(rows) :], *dy.shape[len(rows) :]).astype(dtype.dtype)
    return dx, dw


_linear.defvjp(_forward, _backward, symbolic_zeros=True)
