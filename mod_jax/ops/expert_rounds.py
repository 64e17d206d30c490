"""The experts of all peers, on the tokens of all peers, in rounds of bounded size.

Axes: n tokens of a device, K choices of each, D width, F width of the feed-forward layer, P peers
along the mesh axis `expert`, e experts of a device, c rows of a round for each peer.

The (token, choice) pairs of a device are sorted by expert, and so by peer. In a round every pair of
peers exchanges at most c rows: those from `begin` to `begin + c` of the ones that one has for the
other. What arrives is sorted by expert, passes SwiGLU by grouped matmuls, and goes back to where it
came from. Rounds follow until all rows were served; all devices of the mesh agree on their number.

So no token is ever dropped, and imbalance costs time. The first round has room for a little more
than an even routing needs, and mostly is the only one. The others, in a loop, are a quarter as
large, so that a small excess costs little.

A loop whose number of rounds is known at run time only has no derivative in reverse mode, so the
gradient is written out here: the same rounds again, each with its own forward pass. Of the first
round the intermediate results are saved, or made again, as remat decides for all that surrounds it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mod_jax.ops.exchange_form import swap
from mod_jax.ops.expert_windows import Routing, rows_of_rounds, window_of
from mod_jax.ops.grouped_matmul import grouped_matmul

Arrays = tuple[jax.Array, ...]


def _round(
    form: str,
    routing: Routing,
    begin: jax.Array | int,
    rows: int,
    x: jax.Array,
    weights: jax.Array,
    experts: Arrays,
) -> jax.Array:
    """f32[n,D]: what the pairs of one round add to each token; it has a derivative."""
    window = window_of(routing, begin, rows)
    pairs_per_token = weights.shape[1]
    token = window.pair // pairs_per_token
    back = (window.received, window.sent)
    with jax.named_scope("spread"):
        sent = spread(x, token, window.slot)
        shares = spread(weights.reshape(-1), window.pair, window.slot.reshape(-1, 1))
    received = swap(form, sent, window.sent, window.received)
    shares = swap(form, shares, window.sent, window.received)
    arrived, shares = (permute(a, window.order, window.inverse) for a in (received, shares))
    if form == "local":
        # What the experts give is at hand, and narrower than what they compute inside.
        results = _swiglu(arrived, None, experts, window.group_sizes)
        results = (results * shares[:, None]).astype(results.dtype)
    else:
        # equivalent to: weights applied to what comes back. So their gradient needs neither that
        # nor the down projection again.
        results = _swiglu(arrived, shares, experts, window.group_sizes)
    results = permute(results, window.inverse, window.order)
    with jax.named_scope("combine"):
        return collect(swap(form, results, *back), token, window.slot)


@jax.named_scope("swiglu")
def _swiglu(
    rows: jax.Array, shares: jax.Array | None, experts: Arrays, group_sizes: jax.Array
) -> jax.Array:
    """SwiGLU of f[r,D], rows sorted by expert, each times its share f32[r] if there are any."""
    *inner, down = experts
    gate, up = (grouped_matmul(rows, w, group_sizes) for w in inner)
    hidden = jax.nn.silu(gate) * up if shares is None else _hidden(gate, up, shares)
    return grouped_matmul(hidden, down, group_sizes)


def _gated(gate: jax.Array, up: jax.Array, shares: jax.Array) -> jax.Array:
    """f[r,F], computed in float32."""
    product = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return (product * shares[:, None]).astype(gate.dtype)


# equivalent to: _gated. Its gradient keeps the arguments, and no f32[r,F], whatever remat says.
_hidden = jax.custom_vjp(_gated)
_hidden.defvjp(
    lambda *arguments: (_gated(*arguments), arguments),
    lambda arguments, dy: jax.vjp(_gated, *arguments)[1](dy),
)


def in_rounds(
    form: str, routing: Routing, x: jax.Array, weights: jax.Array, experts: Arrays
) -> jax.Array:
    """Sums weight * expert(token) over the choices of each token, within `jax.shard_map` if P > 1.

    Args:
      form: From `exchange_form`.
      routing: From `routing_of`.
      x: f[...,D].
      weights: f32[...,K].
      experts: Gate and up f[e,D,F] and down f[e,F,D] of this device's experts.

    Returns:
      f[...,D] in the dtype of `x`. Gradients of the experts are summed over rounds in their dtype.
    """
    rows, weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1, weights.shape[-1])
    return _served(form, routing, rows, weights, experts).astype(x.dtype).reshape(x.shape)


def _served(
    form: str, routing: Routing, x: jax.Array, weights: jax.Array, experts: Arrays
) -> jax.Array:
    """`in_rounds` of f[n,D] and f32[n,K], in float32."""
    first, later = rows_of_rounds(*weights.shape, *routing.arriving.shape)
    if not later:
        return _round(form, routing, 0, first, x, weights, experts)

    dtypes = [w.dtype for w in experts]

    def more(routing: Routing, result: Callable, total):
        """Adds what the rounds after the first one give."""
        rounds = jnp.maximum(0, -(-(routing.longest - first) // later))
        with jax.named_scope("later_rounds"):
            return jax.lax.fori_loop(
                0,
                rounds,
                lambda i, total: jax.tree.map(jnp.add, total, result(first + i * later)),
                total,
            )

    def serve(routing, begin, x, weights, narrow):
        """A later round, of experts in the dtype of `x`, whose gradients have their own dtype."""
        # A loop cannot drop casts around what it only reads: what it reads is narrow.
        wide = tuple(w.astype(dtype) for w, dtype in zip(narrow, dtypes))
        return jax.vjp(functools.partial(_round, form, routing, begin, later), x, weights, wide)

    @jax.custom_vjp
    def served(routing, *operands):
        return forward(routing, *operands)[0]

    def forward(routing, x, weights, experts):
        y, pullback = jax.vjp(
            functools.partial(_round, form, routing, 0, first), x, weights, experts
        )
        operands = (x, weights, tuple(w.astype(x.dtype) for w in experts))
        y = more(routing, lambda begin: serve(routing, begin, *operands)[0], y)
        return y, (pullback, routing, operands)

    def backward(saved, dy):
        pullback, routing, operands = saved
        gradients = more(
            routing, lambda begin: serve(routing, begin, *operands)[1](dy), pullback(dy)
        )
        return None, *gradients

    served.defvjp(forward, backward)
    return served(routing, x, weights, experts)


@jax.custom_vjp
def spread(x: jax.Array, source: jax.Array, slot: jax.Array) -> jax.Array:
    """Copies each row of `x` to all of its slots.

    Args:
      x: f[n,...].
      source: i32[r], the row of `x` in each slot; n for none.
      slot: i32[n,K], the slots of each row of `x`; r for none. Both say the same.

    Returns:
      f[r,...], 0 in slots without a row.
    """
    # equivalent to: this line alone, whose gradient would be a scatter; `collect` gathers
    return x.at[source].get(mode="fill", fill_value=0)


@jax.custom_vjp
def collect(rows: jax.Array, source: jax.Array, slot: jax.Array) -> jax.Array:
    """The transpose of `spread`: sums the slots of each row, f[r,...] -> f32[n,...]."""
    return jnp.sum(rows.at[slot].get(mode="fill", fill_value=0), axis=1, dtype=jnp.float32)


def _spread_forward(x, source, slot):
    return spread(x, source, slot), (source, slot)


def _spread_backward(indices, dy):
    return collect(dy, *indices).astype(dy.dtype), None, None


def _collect_forward(rows, source, slot):
    return collect(rows, source, slot), (jnp.zeros((), rows.dtype), source, slot)


def _collect_backward(saved, dy):
    dtype, *indices = saved
    return spread(dy.astype(dtype.dtype), *indices), None, None


spread.defvjp(_spread_forward, _spread_backward)
collect.defvjp(_collect_forward, _collect_backward)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Reorders rows.

    Args:
      x: f[n,...].
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
