"""Products with float32 weights and sums with float32 biases, under activations of any dtype.

They compute in the dtype of the activations, but a gradient of a weight or bias is summed in
float32, over positions and over devices. Autodiff would sum the gradient of the weight as it is
cast for the product: in bfloat16, where a term below 1/256 of the sum so far is lost.

Axes: D inputs, F outputs; either may be several dimensions (heads and their size).
"""

import jax
import jax.numpy as jnp


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
    if x.dtype == jnp.float32 or w.dtype != jnp.float32:
        return _product(inputs, x, w)
    return _with_float32_gradient(inputs, x, w)


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


def _product(inputs: int, x: jax.Array, w: jax.Array) -> jax.Array:
    letters = "zyxwv"[: w.ndim]
    contracted, outputs = letters[:inputs], letters[inputs:]
    return jnp.einsum(f"...{contracted},{letters}->...{outputs}", x, w.astype(x.dtype))


def _forward(inputs: int, x: jax.Array, w: jax.Array):
    return _product(inputs, x, w), (x, w.astype(x.dtype))


def _backward(inputs: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array):
    x, w = saved
    rows = tuple(range(x.ndim - inputs))
    in_w = tuple(range(inputs, w.ndim))
    in_dy = tuple(range(len(rows), dy.ndim))
    dx = jnp.tensordot(dy, w, (in_dy, in_w))
    return dx, jnp.tensordot(x, dy, (rows, rows), preferred_element_type=jnp.float32)


_with_float32_gradient = jax.custom_vjp(_product, nondiff_argnums=(0,))
_with_float32_gradient.defvjp(_forward, _backward)
