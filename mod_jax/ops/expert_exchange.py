"""The routed feed-forward layer on a mesh: tokens travel to the devices of their experts, and back.

Axes: B rows of the batch, S positions, D width, F width of the feed-forward layer, E experts,
K experts per token.

All of it happens inside one `jax.shard_map`. This file gathers the experts' weights there and sums
what the devices along `tensor` give; `expert_rounds` moves the tokens, in rounds of bounded size,
in the form that `exchange_form` names.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mod_jax.config import require
from mod_jax.ops.exchange_form import exchange_form
from mod_jax.ops.expert_rounds import in_rounds
from mod_jax.ops.expert_windows import routing_of
from mod_jax.ops.weights import keeps_no_weight, scattered, whole
from mod_jax.sharding import AXES, ROWS, ambient_mesh, mesh_axes, partition, row_ways, varying

# Logical axes of gate, up and down.
EXPERT_AXES = (
    ("expert", "expert_embed", "mlp"),
    ("expert", "expert_embed", "mlp"),
    ("expert", "mlp", "expert_embed"),
)


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
    mesh = ambient_mesh()
    if mesh is None:
        return in_rounds("local", routing_of(choices, len(gate_w_edf), 1), x, weights, experts)
    peers = mesh.shape["expert"]
    ways = row_ways(mesh)
    require(
        len(gate_w_edf) % peers == 0,
        "moe.num_experts",
        len(gate_w_edf),
        f"a multiple of mesh.expert {peers}",
        "Choose a smaller expert axis.",
    )
    require(len(x) % ways == 0, "rows", len(x), f"a multiple of data x fsdp x expert = {ways}")
    rows = PartitionSpec(ROWS)
    lie = tuple(partition(mesh, w.shape, axes) for w, axes in zip(experts, EXPERT_AXES))
    body = functools.partial(_device, exchange_form(mesh), peers, lie)
    return jax.shard_map(body, in_specs=(rows, rows, rows, *lie), out_specs=rows)(
        x, choices, weights, *experts
    )


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
    form: str,
    peers: int,
    lie: tuple[PartitionSpec, ...],
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    *experts: jax.Array,
) -> jax.Array:
    """`in_rounds` on a device of the mesh, with the collectives that its arguments' shardings need.

    All arguments are first cast to vary over all mesh axes along which the results do. The
    transposes of these casts are then the sums that the gradients need: over data for the weights,
    over tensor for the tokens.

    Args:
      form, peers: As in `exchange_form` and `routing_of`.
      lie: Mesh axes of each dimension of the experts.
      x, choices, weights, experts: This device's parts.
    """
    of_experts = {axis for split in lie[0] for axis in mesh_axes(split)}
    split = tuple(axis for axis in AXES if axis not in ROWS and axis in of_experts)
    summed = tuple(axis for axis in ROWS if axis not in of_experts)
    x, choices, weights = (varying(a, split) for a in (x, choices, weights))
    experts = tuple(varying(w, summed) for w in experts)
    routing = routing_of(choices, len(experts[0]), peers)

    # equivalent to: the same without checkpoint. The forward pass saves everything except the
    # gathered weights and their casts, which the backward pass makes again.
    @functools.partial(jax.checkpoint, policy=keeps_no_weight)
    def run(x, weights, *experts):
        with jax.named_scope("gather_weights"):
            gathered = [_gathered(_gathering(of), x.dtype, w) for of, w in zip(lie, experts)]
        return in_rounds(form, routing, x, weights, tuple(gathered))

    y = run(x, weights, *experts)
    # The down projection only sums over this device's part of F.
    return jax.lax.psum(y, split) if split else y


def _gathering(of_expert: PartitionSpec) -> PartitionSpec:
    """The spec of a weight without its first dimension: no device needs the experts of others."""
    return PartitionSpec(None, *of_expert[1:])


def _gather(spec: PartitionSpec, dtype: jnp.dtype, w: jax.Array) -> jax.Array:
    """Gathers the weights of this device's experts in `dtype`; the result has their own dtype.

    So the gradient has that dtype too, in which it is then scattered. XLA removes the two casts
    between the gather and the product.
    """
    return whole(w.astype(dtype), spec).astype(w.dtype)


def _scatter(spec: PartitionSpec, dtype: jnp.dtype, _: None, dw: jax.Array) -> tuple[jax.Array]:
    """The transpose of `_gather`, without its casts."""
    return (scattered(dw, spec),)


_gathered = jax.custom_vjp(_gather, nondiff_argnums=(0, 1))
_gathered.defvjp(lambda spec, dtype, w: (_gather(spec, dtype, w), None), _scatter)
