"""A matrix product whose rows come in groups, each group with a weight of its own.

Axes: n rows, D width in, F width out, E groups (experts), t rows of a block.

Two fast paths behind one function, chosen for the platform the program is compiled for (not the one that compiles it):
`jax.lax.ragged_dot` on accelerators; on CPU, where that does the dense work once a group, a loop over blocks of rows.
"""

import jax
import jax.numpy as jnp

BLOCK = 256  # rows of a block on CPU


@jax.custom_vjp
def grouped_matmul(x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Multiplies each group of rows with its weight.

    Args:
      x: f[n,D], sorted by group; the rows past sum(group_sizes) belong to none.
      w_edf: f[E,D,F].
      group_sizes: i32[E], their sum at most n.
    Returns:
      f[n,F] in x's dtype, accumulated in float32; 0 in the rows of no group.
    """
    # equivalent to: grouped_matmul_oracle
    return jax.lax.platform_dependent(x, w_edf, group_sizes, cpu=_blocks, default=_ragged)


def _forward(x, w_edf, group_sizes):
    return grouped_matmul(x, w_edf, group_sizes), (x, w_edf, group_sizes)


def _backward(saved, dy):
    return *jax.lax.platform_dependent(
        *saved, dy, cpu=_blocks_gradients, default=_ragged_gradients
    ), None


grouped_matmul.defvjp(_forward, _backward)


def grouped_matmul_oracle(x: jax.Array, w_edf: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The same by definition: every row times every weight, of which its own is kept."""
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(x)), side="right")
    one_hot_ne = jax.nn.one_hot(group, len(w_edf), dtype=x.dtype)
    return jnp.einsum(
        "nd,edf,ne->nf", x, w_edf, one_hot_ne, preferred_element_type=jnp.float32
    ).astype(x.dtype)


def _ragged(x, w_edf, group_sizes):
    y = jax.lax.ragged_dot(x, w_edf, group_sizes, preferred_element_type=jnp.float32).astype(
        x.dtype
    )
    grouped = jnp.arange(len(x)) < group_sizes.sum()
    return jnp.where(grouped[:, None], y, 0)  # a kernel may leave the rows of no group unwritten


def _ragged_gradients(x, w_edf, group_sizes, dy):
    return jax.vjp(lambda x, w_edf: _ragged(x, w_edf, group_sizes), x, w_edf)[1](dy)


def _each_block(body, start, rows, group_sizes):
    """`body(carry, group, first_row, mine bool[t,1])` over blocks that cover every group and nothing else.

    A block ends where its group does or after `t` rows; one that would pass the last row is moved back, hence `mine`.
    """
    t = min(BLOCK, rows)
    blocks_e = -(-group_sizes // t)
    last_block_e, last_row_e = jnp.cumsum(blocks_e), jnp.cumsum(group_sizes)

    def step(block, carry):
        group = jnp.sum(block >= last_block_e)
        begin = (
            last_row_e[group]
            - group_sizes[group]
            + (block - last_block_e[group] + blocks_e[group]) * t
        )
        first_row = jnp.minimum(begin, rows - t)
        row = first_row + jnp.arange(t)
        return body(carry, group, first_row, ((row >= begin) & (row < last_row_e[group]))[:, None])

    return jax.lax.fori_loop(0, last_block_e[-1], step, start)


def _block_product(equation, x, w, group_sizes, width):
    t = min(BLOCK, len(x))

    def body(y, group, first_row, mine):
        product = jnp.einsum(
            equation,
            jax.lax.dynamic_slice_in_dim(x, first_row, t),
            w[group],
            preferred_element_type=jnp.float32,
        )
        others = jax.lax.dynamic_slice_in_dim(y, first_row, t)
        return jax.lax.dynamic_update_slice_in_dim(
            y, jnp.where(mine, product.astype(x.dtype), others), first_row, 0
        )

    return _each_block(body, jnp.zeros_like(x, shape=(len(x), width)), len(x), group_sizes)


def _blocks(x, w_edf, group_sizes):
    return _block_product("td,df->tf", x, w_edf, group_sizes, w_edf.shape[2])


def _blocks_gradients(x, w_edf, group_sizes, dy):
    t = min(BLOCK, len(x))

    def body(dw_edf, group, first_row, mine):
        x_td, dy_tf = (
            jnp.where(mine, jax.lax.dynamic_slice_in_dim(a, first_row, t), 0) for a in (x, dy)
        )
        return dw_edf.at[group].add(
            jnp.einsum("td,tf->df", x_td, dy_tf, preferred_element_type=jnp.float32)
        )

    dx = _block_product("tf,df->td", dy, w_edf, group_sizes, x.shape[1])
    dw_edf = _each_block(body, jnp.zeros_like(w_edf, dtype=jnp.float32), len(x), group_sizes)
    return dx, dw_edf.astype(w_edf.dtype)
