"""Products with float32 weights and sums with float32 biases, under activations of any dtype.

They compute in the dtype of the activations, but a gradient of a weight or bias is summed in
float32, over positions and over devices. Autodiff would sum the gradient of the weight as it is
cast for the product: in bfloat16, where a term below 1/256 of the sum so far is lost.

On a mesh each device multiplies its own rows. It gathers the weight along the axes that rows are
split over too, in the dtype of the activations (`ops.weights`), and its gradient is scattered back
to the devices that hold its parts. Left to the partitioner, whole gradients are sum-reduced on
every device, and weights of narrow parts are gathered as sums of arrays that are zero but for one
part (seen in programs for v5e and v5p). Along `tensor` the weight stays split: devices there have
their slices of heads or of the inner width, and sum up what a contraction over slices gives.

Axes: B rows, D inputs, F outputs; each of the latter may be several dimensions (heads and their
size).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from mod_jax.ops.weights import own_share, whole
from mod_jax.sharding import ROWS, ambient_mesh, partition

TENSOR = "tensor"


class Layout(NamedTuple):
    """How a product is laid out; hashable, as it is static.

    Attributes:
      inputs: Number of dimensions of D.
      on_mesh: Whether there are several devices. There the weight is a matrix, so `inputs` is 1.
      matrix: The mesh axes of the two dimensions of this matrix.
    """

    inputs: int
    on_mesh: bool = False
    matrix: PartitionSpec = PartitionSpec(None, None)

    @property
    def contracted(self) -> str | None:
        """`tensor` if devices along it hold slices of D."""
        return TENSOR if self.matrix[0] == TENSOR else None

    @property
    def output(self) -> str | None:
        """`tensor` if devices along it make slices of F."""
        return TENSOR if self.matrix[1] == TENSOR else None


def linear(
    x: jax.Array, w: jax.Array, inputs: int = 1, axes: Sequence[str | None] | None = None
) -> jax.Array:
    """Multiplies the last dimensions of `x` with the first ones of a weight.

    Args:
      x: f[..., D]; on a mesh f[B, ..., D], with B a multiple of the devices that rows are split
        over.
      w: f32[D, F], cast to the dtype of `x` for the product.
      inputs: Number of dimensions of D.
      axes: Logical axis (a key of `sharding.RULES`) of each dimension of `w`, which say where its
        parts lie on the ambient mesh. Without them the partitioner decides.

    Returns:
      f[..., F] in the dtype of `x`.
    """
    # equivalent to: jnp.tensordot(x, w.astype(x.dtype), inputs)
    mesh = ambient_mesh()
    if axes is None or mesh is None:
        return _linear(Layout(inputs), x, w)
    # As a product of matrices: of the dimensions of D, and of those of F, only the first is split.
    lies = partition(mesh, w.shape, axes)
    layout = Layout(1, True, PartitionSpec(lies[0], lies[inputs]))
    rows, outputs = x.shape[: x.ndim - inputs], w.shape[inputs:]
    array = w if isinstance(w, jax.Array) else w.astype(x.dtype)  # from int8
    matrix = array.reshape(math.prod(w.shape[:inputs]), -1)
    y = _linear(layout, x.reshape(*rows, len(matrix)), matrix)
    return y.reshape(*rows, *outputs)


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
def _linear(layout: Layout, x: jax.Array, w: jax.Array) -> jax.Array:
    return _product(layout, x, w.astype(x.dtype))[0]


def _forward(layout: Layout, x, w):
    """Saves what the gradients need that are asked for: of a frozen weight none, so no `x`."""
    y, w_whole = _product(layout, x.value, w.value.astype(x.value.dtype))
    dtype = jnp.zeros((), w.value.dtype)  # what is saved has to be an array
    return y, (x.value if w.perturbed else None, w_whole if x.perturbed else None, dtype)


def _backward(layout: Layout, saved: tuple, dy: jax.Array | SymbolicZero):
    if isinstance(dy, SymbolicZero):
        return None, None
    x, w, dtype = saved
    dx = None if w is None else _input_gradient(layout, dy, w)
    dw = None if x is None else _weight_gradient(layout, x, dy).astype(dtype.dtype)
    return dx, dw


_linear.defvjp(_forward, _backward, symbolic_zeros=True)


def _product(layout: Layout, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x times w, the weight as each device multiplied it)."""
    letters = "zyxwv"[: w.ndim]
    contracted, outputs = letters[: layout.inputs], letters[layout.inputs :]

    def run(x, w):
        w = whole(w, layout.matrix)
        y = jnp.einsum(f"...{contracted},{letters}->...{outputs}", x, w)
        return _summed(layout.contracted, y), w

    of_x, of_y, of_w = _specs(layout, x.ndim - layout.inputs)
    return _on_devices(layout, run, (of_x, layout.matrix), (of_y, of_w))(x, w)


def _input_gradient(layout: Layout, dy: jax.Array, w: jax.Array) -> jax.Array:
    """f[..., D] from f[..., F] and the weight that the product used."""
    in_w = tuple(range(layout.inputs, w.ndim))
    rows = dy.ndim - len(in_w)

    def run(dy, w):
        dx = jnp.tensordot(dy, w, (tuple(range(rows, dy.ndim)), in_w))
        return _summed(layout.output, dx)

    of_x, of_y, of_w = _specs(layout, rows)
    return _on_devices(layout, run, (of_y, of_w), of_x)(dy, w)


def _weight_gradient(layout: Layout, x: jax.Array, dy: jax.Array) -> jax.Array:
    """f32[D, F], summed over all rows."""
    rows = x.ndim - layout.inputs

    def run(x, dy):
        # As one product of matrices, x first: XLA on CPU takes it as it is. What autodiff would
        # write, it computes from a transposed copy of `dy`, which takes longer than the product.
        x_nd, dy_nf = (a.reshape(math.prod(a.shape[:rows]), -1) for a in (x, dy))
        dw = jnp.einsum("nd,nf->df", x_nd, dy_nf, preferred_element_type=jnp.float32)
        dw = dw.reshape(*x.shape[rows:], *dy.shape[rows:])
        return own_share(dw, layout.matrix) if layout.on_mesh else dw

    of_x, of_y, _ = _specs(layout, rows)
    return _on_devices(layout, run, (of_x, of_y), layout.matrix)(x, dy)


def _specs(layout: Layout, rows: int) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """How x, y and the gathered weight are split, where x has `rows` dimensions before D."""
    before = (ROWS, *[None] * (rows - 1))
    d, f = layout.contracted, layout.output
    return PartitionSpec(*before, d), PartitionSpec(*before, f), PartitionSpec(d, f)


def _on_devices(layout: Layout, run: Callable, in_specs, out_specs) -> Callable:
    """`run`, on each device of a mesh with its own parts."""
    if not layout.on_mesh:
        return run
    # The gathered weight is the same on all devices of its axes, which the types cannot tell.
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _summed(slices: str | None, x: jax.Array) -> jax.Array:
    """The sum over the devices that hold slices of a contracted dimension."""
    return jax.lax.psum(x, slices) if slices else x
