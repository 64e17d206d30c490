"""The routed feed-forward layer on a mesh: tokens travel to the devices of their experts, and back.

Axes: B rows of the batch, S positions, D width, F width of the feed-forward layer, E experts,
K experts per token.

All of it happens inside one `jax.shard_map`. This file gathers the experts' weights there and sums
what the devices along `tensor` give; `expert_rounds` moves the tokens, in rounds of bounded size,
in the form that `exchange_form` names.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mod_jax.config import require
from mod_jax.ops.exchange_form import exchange_form
from mod_jax.ops.expert_rounds import in_rounds
from mod_jax.ops.expert_windows import routing_of
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
    form = exchange_form(mesh)
    if mesh.empty or mesh.size == 1:
        return in_rounds(form, routing_of(choices, len(gate_w_edf), 1), x, weights, experts)
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
    body = functools.partial(_device, form, peers)
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
    form: str,
    peers: int,
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    *experts: jax.Array,
) -> jax.Array:
    """`in_rounds` on a device of the mesh, with the collectives that its arguments' shardings need.

    All arguments are first cast to vary over all mesh axes. The transposes of these casts are then
    the sums that the gradients need: over data for the weights, over tensor for the tokens.
    """
    varying = functools.partial(jax.lax.pcast, to="varying")
    other_axes = tuple(axis for axis in AXES if axis not in ROWS)
    x, choices, weights = (varying(a, other_axes) for a in (x, choices, weights))
    gate, up, down = (varying(w, "data") for w in experts)
    routing = routing_of(choices, len(gate), peers)

    # equivalent to: the same without checkpoint. The forward pass saves everything except the
    # gathered weights and their casts, which the backward pass makes again.
    again = ("all_gather", "convert_element_type")

    @functools.partial(
        jax.checkpoint, policy=lambda primitive, *_, **__: primitive.name not in again
    )
    def run(x, weights, gate, up, down):
        with jax.named_scope("gather_weights"):
            whole = [_gathered(axis, x.dtype, w) for w, axis in ((gate, 1), (up, 1), (down, 2))]
        return in_rounds(form, routing, x, weights, tuple(whole))

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
