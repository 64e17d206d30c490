"""The grouped matmul by tokamax's kernels, for NVIDIA GPUs.

Axes: n rows, D input width, F output width, E groups (experts).

tokamax has two kernels: "mosaic" with the instructions of Hopper and Blackwell, for bfloat16, and
"triton" for the rest. It is asked for the first one where the sizes fit: 0.0.12 leaves out what
does not fill the last block of 128 of the summed width, without an error, and needs full blocks
of 64 rows for the gradient of the weights.
"""

import jax
import jax.numpy as jnp

from mod_jax.ops.device_kernel import on_device
from mod_jax.ops.nvidia import tokamax

WIDTH_BLOCK, ROW_BLOCK = 128, 64  # of the mosaic kernel
LARGEST_BLOCK = 128  # rows that the triton kernel reads at a time, at most
# x[n,D] and w[E,D,F] -> [n,F]; lists, not tuples: tokamax compares them with its own
BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [1]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
# x[n,D] and dy[n,F] -> [E,D,F]: the sum over the rows of each group.
GROUPS_SUMMED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([0], [0]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def tokamax_matmul(x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` of weights in the dtype of `x`."""
    y = on_device(_by_group, x, w_edf, group_sizes)
    return _without_rest(y, group_sizes)


def tokamax_gradients(x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array, dy: jax.Array):
    """(dx in the dtype of `x`, dw f32[E,D,F])."""
    # The kernel of the sum multiplies what it has to leave out by 0. Both products read one `dy`.
    x, dy = (_without_rest(a, group_sizes) for a in (x, dy))
    dx = tokamax_matmul(dy, w_edf.swapaxes(1, 2), group_sizes)
    dw_edf = on_device(_groups_summed, x, dy, group_sizes)
    return dx, jnp.where(group_sizes[:, None, None] > 0, dw_edf, 0)


def _without_rest(x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Puts 0 into the rows of no group, which kernels leave as the memory was."""
    return jnp.where((jnp.arange(len(x)) < group_sizes.sum())[:, None], x, 0)


def _by_group(x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array) -> jax.Array:
    fits = len(x) % ROW_BLOCK == 0 and not any(d % WIDTH_BLOCK for d in w_edf.shape[1:])
    return tokamax().ragged_dot_general(
        x,
        w_edf,
        group_sizes,
        BY_GROUP,
        preferred_element_type=x.dtype,
        implementation=("mosaic", "triton") if fits else "triton",
    )


def _groups_summed(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """f32[E,D,F]; of groups without rows it has no meaning."""
    if x.shape[1] > dy.shape[1]:  # the kernel transposes its first operand, here the smaller one
        return _groups_summed(dy, x, group_sizes).swapaxes(1, 2)
    fits = len(x) % ROW_BLOCK == 0 and not any(a.shape[1] % WIDTH_BLOCK for a in (x, dy))
    return tokamax().ragged_dot_general(
        x,
        dy,
        group_sizes,
        GROUPS_SUMMED,
        preferred_element_type=jnp.float32,
        implementation=("mosaic", _triton_sum) if fits else (_triton_sum,),
    )


def _triton_sum(x: jax.Array, dy: jax.Array, group_sizes: jax.Array, **options) -> jax.Array:
    """The triton kernel, which for an empty group reads the block of rows before it.

    A block of zeros before the first row keeps it within the array. (tokamax 0.0.12: the gradient
    of a group without rows is that of the rows before it.)
    """
    x, dy = (jnp.pad(a, ((LARGEST_BLOCK, 0), (0, 0))) for a in (x, dy))
    sizes = jnp.concatenate([jnp.full(1, LARGEST_BLOCK, group_sizes.dtype), group_sizes])
    numbers = options.pop("ragged_dot_dimension_numbers")
    del options["activation"]  # none
    sums = tokamax().ragged_dot_general(x, dy, sizes, numbers, **options, implementation="triton")
    return sums[1:]
