"""The routed feed-forward layer on a mesh: tokens travel to the devices of their experts, and back.

Axes: B rows of the batch, S positions, D width, F width of the feed-forward layer, E experts,
K experts per token, n tokens of a device, P peers along the mesh axis `expert`, r rows received.

All of it happens inside one `jax.shard_map`: sort the n * K (token, choice) rows by expert; send
each peer the rows of its E / P experts (a ragged all-to-all); sort what arrived by expert; SwiGLU
by grouped matmuls; send the results back the same way; sum the results of each token, weighted, in
float32.

No token is ever dropped, so the receive buffer is sized for the worst case, in which all tokens of
all P peers choose experts of this device: r = P * n * min(K, E / P) rows of D, and of F inside the
experts. The grouped matmuls only touch the rows that arrived.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mod_jax.config import require
from mod_jax.ops.grouped_matmul import grouped_matmul
from mod_jax.sharding import AXES, ROWS, RULES


def expert_layer(
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    gate_w_edf: jax.Array,
    up_w_edf: jax.Array,
    down_w_efd: jax.Array,
) -> jax.Array:
    """Sums weight * expert(token) over the choices of each token, under the ambient mesh if any.

    Args:
      x: f[B,S,D].
      choices: i32[B,S,K], distinct experts of each token; E stands for no expert.
      weights: f32[B,S,K], weights of the choices.
      gate_w_edf, up_w_edf: f[E,D,F], gathered and multiplied in the dtype of `x`; their gradients
        are summed in float32.
      down_w_efd: f[E,F,D], the same.

    Returns:
      f[B,S,D] in the dtype of `x`.

    Raises:
      ConfigError: If the experts or the rows do not divide over the mesh.
    """
    # equivalent to: expert_layer_oracle(x, choices, weights, gate_w_edf, up_w_edf, down_w_efd)
    experts = (gate_w_edf, up_w_edf, down_w_efd)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _route(x, choices, weights, *experts, peers=1)
    peers = mesh.shape["expert"]
    ways = math.prod(mesh.shape[axis] for axis in ROWS)
    require(
        len(gate_w_edf) % peers == 0,
        "moe.num_experts",
        len(gate_w_edf),
        f"a multiple of mesh.expert {peers}",
        "Choose a smaller expert axis.",
    )
    require(len(x) % ways == 0, "rows", len(x), f"a multiple of data x fsdp x expert = {ways}")
    rows = PartitionSpec(ROWS)
    in_spec = PartitionSpec(*map(RULES.get, ("expert", "expert_embed", "mlp")))
    out_spec = PartitionSpec(*map(RULES.get, ("expert", "mlp", "expert_embed")))
    body = functools.partial(_device, peers=peers)
    return jax.shard_map(
        body, in_specs=(rows, rows, rows, in_spec, in_spec, out_spec), out_specs=rows
    )(x, choices, weights, *experts)


def expert_layer_oracle(
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    gate_w_edf: jax.Array,
    up_w_edf: jax.Array,
    down_w_efd: jax.Array,
) -> jax.Array:
    """`expert_layer` by its definition: every expert runs on every token."""
    gate = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, gate_w_edf))
    up = jnp.einsum("bsd,edf->bsef", x, up_w_edf)
    outputs = jnp.einsum("bsef,efd->bsed", gate * up, down_w_efd)
    is_choice = jax.nn.one_hot(choices, len(gate_w_edf))
    weight_of_expert = jnp.einsum("bsk,bske->bse", weights, is_choice)
    return jnp.einsum("bsed,bse->bsd", outputs, weight_of_expert).astype(x.dtype)


def _device(
    x: jax.Array, choices: jax.Array, weights: jax.Array, *experts: jax.Array, peers: int
) -> jax.Array:
    """`_route` on one device of the mesh, with the collectives that its arguments' shardings need.

    All arguments are first cast to vary over all mesh axes. The transposes of these casts are then
    the sums that the gradients need: over data for the weights, over tensor for the tokens.
    """
    varying = functools.partial(jax.lax.pcast, to="varying")
    other_axes = tuple(axis for axis in AXES if axis not in ROWS)
    x, choices, weights = (varying(a, other_axes) for a in (x, choices, weights))
    gate, up, down = (varying(w, "data") for w in experts)

    # equivalent to: the same without checkpoint. The forward pass saves everything except the
    # gathered weights and their casts, which the backward pass makes again.
    again = ("all_gather", "convert_element_type")

    @functools.partial(
        jax.checkpoint, policy=lambda primitive, *_, **__: primitive.name not in again
    )
    def run(x, weights, gate, up, down):
        with jax.named_scope("gather_weights"):
            whole = [_gathered(axis, x.dtype, w) for w, axis in ((gate, 1), (up, 1), (down, 2))]
        return _route(x, choices, weights, *whole, peers=peers)

    # The down projection only sums over this device's part of F.
    return jax.lax.psum(run(x, weights, gate, up, down), "tensor")


def _gather(axis: int, dtype: jnp.dtype, w: jax.Array) -> jax.Array:
    """Gathers a weight over `fsdp` in `dtype`; the result has the weight's own dtype again.

    So its gradient has that dtype too, in which it is then scattered. XLA removes the two casts
    between the gather and the product.
    """
    whole = jax.lax.all_gather(w.astype(dtype), "fsdp", axis=axis, tiled=True)
    return whole.astype(w.dtype)


def _scatter(axis: int, dtype: jnp.dtype, _: None, dw: jax.Array) -> tuple[jax.Array]:
    """The transpose of `_gather`, without its casts."""
    return (jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=axis, tiled=True),)


_gathered = jax.custom_vjp(_gather, nondiff_argnums=(0, 1))
_gathered.defvjp(lambda axis, dtype, w: (_gather(axis, dtype, w), None), _scatter)


def _route(
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    peers: int,
) -> jax.Array:
    """The layer for the tokens of one device; with one peer it needs and uses no collective."""
    *shape, D = x.shape
    K = choices.shape[-1]
    E = len(gate) * peers
    expert = choices.reshape(-1)
    with jax.named_scope("sort"):
        counts_e = jnp.sum(expert[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
        order = jnp.argsort(expert)
        inverse = jnp.argsort(order)
        rows = permute(jnp.repeat(x.reshape(-1, D), K, axis=0), order, inverse)
    if peers == 1:
        rows = _swiglu(rows, gate, up, down, counts_e)
    else:
        capacity = peers * (len(expert) // K) * min(K, len(gate))
        rows = _remote(rows, counts_e, gate, up, down, peers, capacity)
    with jax.named_scope("combine"):
        outputs = permute(rows, inverse, order).reshape(*shape, K, D)
        # The default precision of a TPU would round the weights to bfloat16.
        summed = jnp.einsum("...kd,...k->...d", outputs, weights, precision="highest")
        return summed.astype(x.dtype)


def _remote(
    rows: jax.Array,
    counts_e: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    peers: int,
    capacity: int,
) -> jax.Array:
    """`_swiglu` of rows sorted by expert, computed on the peers that hold the experts."""
    # [sender, receiver, expert of the receiver]
    counts = jax.lax.all_gather(counts_e, "expert").reshape(peers, peers, -1)
    sizes = counts.sum(2)  # [sender, receiver]
    # [sender, expert]: rows that arrive here, in the order of arrival
    mine = counts[:, jax.lax.axis_index("expert")]
    passed = jnp.sum(jnp.arange(capacity)[:, None] >= jnp.cumsum(mine.reshape(-1)), axis=1)
    # by expert, with the unused rows of the buffer last
    expert_of_row = jnp.where(passed < mine.size, passed % len(gate), len(gate))
    order = jnp.argsort(expert_of_row)
    inverse = jnp.argsort(order)
    rows_sent = len(rows)
    rows = permute(exchange(rows, sizes, capacity), order, inverse)
    rows = _swiglu(rows, gate, up, down, mine.sum(0))
    return exchange(permute(rows, inverse, order), sizes.T, rows_sent)


@jax.named_scope("swiglu")
def _swiglu(
    rows: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """SwiGLU of f[r,D], rows sorted by expert, `group_sizes` i32[experts] of each expert."""
    activated = jax.nn.silu(grouped_matmul(rows, gate, group_sizes))
    hidden = activated * grouped_matmul(rows, up, group_sizes)
    return grouped_matmul(hidden, down, group_sizes)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Reorders rows.

    Args:
      x: f[n,D].
      order: i32[n], a permutation.
      inverse: i32[n], the inverse of `order`.

    Returns:
      x[order].
    """
    # equivalent to: x[order], whose gradient would be a scatter; with the inverse it is a gather
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], inverse), lambda inverse, dy: (dy[inverse], None, None)
)


@jax.named_scope("exchange")
def exchange(rows: jax.Array, sizes: jax.Array, capacity: int) -> jax.Array:
    """A ragged all-to-all over the mesh axis `expert`, for use inside `jax.shard_map`.

    Args:
      rows: f[n,D], what this device sends: the rows for peer 0, then for peer 1, and so on.
      sizes: i32[P,P], rows from each sender to each receiver, the same on all peers.
      capacity: Rows of the result, at least the largest column sum of `sizes`.

    Returns:
      f[capacity,D], what arrived: from peer 0, then from peer 1, and so on, then zeros.
    """
    rows_sent = len(rows)
    native = functools.partial(_native, capacity=capacity)
    emulated = functools.partial(_emulated, capacity=capacity)

    # equivalent to: the gradient that _native has by itself. This one serves the emulation too, and
    # saves nothing but the sizes.
    @jax.custom_vjp
    def send(rows, sizes):
        return jax.lax.platform_dependent(
            rows, sizes, cpu=emulated, default=emulated if _limited_routing() else native
        )

    send.defvjp(
        lambda rows, sizes: (send(rows, sizes), sizes),
        lambda sizes, dy: (exchange(dy, sizes.T, rows_sent), None),
    )
    return send(rows, sizes)


def _limited_routing() -> bool:
    """Whether the mesh is TPU v5e with more than 4x4 chips.

    XLA refuses there: "Ragged all-to-all is currently not supported in limited ICI routing
    settings".
    """
    mesh = jax.sharding.get_abstract_mesh()
    return (
        mesh.abstract_device is not None
        and mesh.abstract_device.device_kind == "TPU v5 lite"
        and mesh.size > 16
    )


def _starts(sizes: jax.Array, axis: int = 0) -> jax.Array:
    """Where each part starts, if parts of these sizes lie one after the other."""
    return jnp.cumsum(sizes, axis) - sizes


def _native(rows: jax.Array, sizes: jax.Array, capacity: int) -> jax.Array:
    """`exchange` by XLA's ragged all-to-all."""
    me = jax.lax.axis_index("expert")
    empty = jnp.zeros_like(rows, shape=(capacity, rows.shape[1]))
    offsets = (_starts(sizes[me]), sizes[me], _starts(sizes)[me], sizes[:, me])
    return jax.lax.ragged_all_to_all(rows, empty, *offsets, axis_name="expert")


def _emulated(rows: jax.Array, sizes: jax.Array, capacity: int) -> jax.Array:
    """`exchange` by a dense all-to-all, where the ragged one does not exist.

    Every pair of peers exchanges n * min(K, E / P) rows, whatever the routing.
    """
    me = jax.lax.axis_index("expert")
    longest = min(len(rows), capacity)
    indices = _starts(sizes[me])[:, None] + jnp.arange(longest)
    sent = rows.at[indices].get(mode="fill", fill_value=0)
    received = jax.lax.all_to_all(sent, "expert", 0, 0)  # [sender, row of the sender, D]
    row = jnp.arange(capacity)
    sender = jnp.sum(row[:, None] >= jnp.cumsum(sizes[:, me]), axis=1)
    row_of_sender = row - _starts(sizes[:, me])[sender]
    return received.at[sender, row_of_sender].get(mode="fill", fill_value=0)
