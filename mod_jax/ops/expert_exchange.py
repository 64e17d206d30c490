"""The routed feed-forward layer over a mesh: every token's rows go to the devices that hold its experts, and back.

Axes: B rows of the batch, S positions, D width, F feed-forward, E experts, K choices a token, n tokens of a device, P peers along the mesh
axis `expert`, r rows received.

Inside one `jax.shard_map`: sort the n * K (token, choice) rows by expert, send each peer the rows of its E / P experts (a ragged all-to-all),
sort what arrived by expert, SwiGLU by grouped matmul, the same way back, and the weighted sum of a token's choices in float32. Nothing is
ever dropped, so the receive buffer is sized for the worst case, all tokens of all P peers here: r = P * n * min(K, E / P) rows of D
(and of F within the experts), of which the grouped matmul touches only those that came.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mod_jax.config import require
from mod_jax.ops.grouped_matmul import grouped_matmul
from mod_jax.sharding import AXES, ROWS, RULES


def expert_layer(x, choices, weights, gate_w_edf, up_w_edf, down_w_efd) -> jax.Array:
    """Sum over a token's choices of weight * expert(token), under the ambient mesh if there is one.

    Args:
      x: f[B,S,D].
      choices: i32[B,S,K], the experts of a token, all different; E stands for none.
      weights: f32[B,S,K], of the choices.
      gate_w_edf, up_w_edf: f[E,D,F].
      down_w_efd: f[E,F,D].
    Returns:
      f[B,S,D] in x's dtype.
    Raises:
      ConfigError: if the experts or the rows do not divide over the mesh.
    """
    # equivalent to: expert_layer_oracle
    experts = [w.astype(x.dtype) for w in (gate_w_edf, up_w_edf, down_w_efd)]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _route(x, choices, weights, *experts, peers=1)
    peers, ways = mesh.shape["expert"], math.prod(mesh.shape[a] for a in ROWS)
    require(
        len(gate_w_edf) % peers == 0,
        "moe.num_experts",
        len(gate_w_edf),
        f"a multiple of mesh.expert {peers}",
        "Choose a smaller expert axis.",
    )
    require(len(x) % ways == 0, "rows", len(x), f"a multiple of data x fsdp x expert = {ways}")
    rows, in_spec = (
        PartitionSpec(ROWS),
        PartitionSpec(*map(RULES.get, ("expert", "expert_embed", "mlp"))),
    )
    out_spec = PartitionSpec(*map(RULES.get, ("expert", "mlp", "expert_embed")))
    body = functools.partial(_device, peers=peers)
    return jax.shard_map(
        body, in_specs=(rows, rows, rows, in_spec, in_spec, out_spec), out_specs=rows
    )(x, choices, weights, *experts)


def expert_layer_oracle(x, choices, weights, gate_w_edf, up_w_edf, down_w_efd) -> jax.Array:
    """The same by definition: every expert sees every token, and a token keeps the sum of its own."""
    hidden = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, gate_w_edf)) * jnp.einsum(
        "bsd,edf->bsef", x, up_w_edf
    )
    outputs = jnp.einsum("bsef,efd->bsed", hidden, down_w_efd)
    weight_of_expert = jnp.einsum(
        "bsk,bske->bse", weights, jax.nn.one_hot(choices, len(gate_w_edf))
    )
    return jnp.einsum("bsed,bse->bsd", outputs, weight_of_expert).astype(x.dtype)


def _device(x, choices, weights, *experts, peers):
    """`_route` on one device of the mesh, with the collectives of its arguments' shardings.

    Everything is cast to vary over all mesh axes at once, so that the transposes of these casts are the sums that the gradients need: of the
    weights over data, of the tokens over tensor.
    """
    varying = functools.partial(jax.lax.pcast, to="varying")
    beside_rows = tuple(a for a in AXES if a not in ROWS)
    x, choices, weights = (varying(a, beside_rows) for a in (x, choices, weights))
    gate, up, down = (varying(w, "data") for w in experts)

    # equivalent to: the same without checkpoint. It keeps everything but the gathered weights: the backward pass gathers them again.
    @functools.partial(
        jax.checkpoint, policy=lambda primitive, *_, **__: primitive.name != "all_gather"
    )
    def run(x, weights, gate, up, down):
        full = (
            jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True)
            for w, axis in ((gate, 1), (up, 1), (down, 2))
        )
        return _route(x, choices, weights, *full, peers=peers)

    return jax.lax.psum(
        run(x, weights, gate, up, down), "tensor"
    )  # down's product is over this device's part of F


def _route(x, choices, weights, gate, up, down, *, peers):
    """The layer of one device's tokens; with one peer no collective is needed, and none is used."""
    (*shape, D), K, E = x.shape, choices.shape[-1], len(gate) * peers
    expert = choices.reshape(-1)
    counts_e = jnp.sum(expert[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    order = jnp.argsort(expert)
    inverse = jnp.argsort(order)
    rows = permute(jnp.repeat(x.reshape(-1, D), K, axis=0), order, inverse)
    if peers == 1:
        rows = _swiglu(rows, gate, up, down, counts_e)
    else:
        rows = _remote(
            rows,
            counts_e,
            gate,
            up,
            down,
            peers,
            capacity=peers * (len(expert) // K) * min(K, len(gate)),
        )
    outputs = permute(rows, inverse, order).reshape(*shape, K, D)
    return jnp.einsum(
        "...kd,...k->...d", outputs, weights, preferred_element_type=jnp.float32
    ).astype(x.dtype)


def _remote(rows, counts_e, gate, up, down, peers, capacity):
    """`_swiglu` of rows sorted by expert, on the peers that hold the experts."""
    counts = jax.lax.all_gather(counts_e, "expert").reshape(
        peers, peers, -1
    )  # [sender, receiver, expert of the receiver]
    sizes = counts.sum(2)  # [sender, receiver]
    mine = counts[
        :, jax.lax.axis_index("expert")
    ]  # [sender, expert]: what arrives here, in this order
    passed = jnp.sum(jnp.arange(capacity)[:, None] >= jnp.cumsum(mine.reshape(-1)), axis=1)
    order = jnp.argsort(
        jnp.where(passed < mine.size, passed % len(gate), len(gate))
    )  # by expert, buffer places that stayed empty last
    inverse = jnp.argsort(order)
    rows_sent = len(rows)
    rows = permute(exchange(rows, sizes, capacity), order, inverse)
    rows = _swiglu(rows, gate, up, down, mine.sum(0))
    return exchange(permute(rows, inverse, order), sizes.T, rows_sent)


def _swiglu(rows, gate, up, down, group_sizes):
    hidden = jax.nn.silu(grouped_matmul(rows, gate, group_sizes)) * grouped_matmul(
        rows, up, group_sizes
    )
    return grouped_matmul(hidden, down, group_sizes)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x f[n,D] in the order i32[n], a permutation; `inverse` i32[n] is its inverse."""
    # equivalent to: x[order], whose gradient would be a scatter; knowing the inverse it is a gather
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], inverse), lambda inverse, dy: (dy[inverse], None, None)
)


def exchange(rows: jax.Array, sizes: jax.Array, capacity: int) -> jax.Array:
    """A ragged all-to-all over the mesh axis `expert`, within `jax.shard_map`.

    Args:
      rows: f[n,D], what this device sends: the rows for peer 0, then for peer 1, ...
      sizes: i32[P,P], rows from each sender to each receiver, the same on all peers.
      capacity: rows of the result, at least the sum of any column of `sizes`.
    Returns:
      f[capacity,D], what arrived: from peer 0, then from peer 1, ...; 0 past them.
    """
    rows_sent = len(rows)
    native, emulated = (functools.partial(path, capacity=capacity) for path in (_native, _emulated))

    # equivalent to: _native's own gradient; this one also serves the emulation, and keeps nothing but the sizes
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
    """TPU v5e above 4x4, where XLA refuses: "Ragged all-to-all is currently not supported in limited ICI routing settings"."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        mesh.abstract_device is not None
        and mesh.abstract_device.device_kind == "TPU v5 lite"
        and mesh.size > 16
    )


def _starts(sizes, axis=0):
    return jnp.cumsum(sizes, axis) - sizes


def _native(rows, sizes, capacity):
    me = jax.lax.axis_index("expert")
    empty = jnp.zeros_like(rows, shape=(capacity, rows.shape[1]))
    offsets = (_starts(sizes[me]), sizes[me], _starts(sizes)[me], sizes[:, me])
    return jax.lax.ragged_all_to_all(rows, empty, *offsets, axis_name="expert")


def _emulated(rows, sizes, capacity):
    """Equal to `_native` where that does not exist: every pair of peers exchanges n * min(K, E / P) rows, whatever the routing."""
    me = jax.lax.axis_index("expert")
    longest = min(len(rows), capacity)
    sent = rows.at[_starts(sizes[me])[:, None] + jnp.arange(longest)].get(mode="fill", fill_value=0)
    came = jax.lax.all_to_all(sent, "expert", 0, 0)  # [sender, place, D]
    place = jnp.arange(capacity)
    sender = jnp.sum(place[:, None] >= jnp.cumsum(sizes[:, me]), axis=1)
    return came.at[sender, place - _starts(sizes[:, me])[sender]].get(mode="fill", fill_value=0)
