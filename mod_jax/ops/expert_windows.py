"""Which rows travel in which round of the expert exchange.

Axes: n tokens of a device, K choices of each, P peers along the mesh axis `expert`, e experts of a
device, c rows of a round for each peer.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mod_jax.sharding import AXES

SLACK = 1.25  # rows of the first round, over those of an even routing
LATER = 4  # rows of the first round over those of a later one
TILE = 128  # of which the rows of a round are a multiple: a block of the grouped matmuls


class Routing(NamedTuple):
    """Which rows a device sends and receives.

    Attributes:
      order: i32[n*K], (token, choice) pairs sorted by expert; pairs without one come last.
      peer: i32[n,K], device of the expert; P for no expert.
      place: i32[n,K], of the pair among those for its peer.
      sent: i32[P], rows for each peer.
      arriving: i32[P,e], rows that each peer has for each expert of this device.
      longest: i32[], the most rows that any device of the mesh has for a peer.
    """

    order: jax.Array
    peer: jax.Array
    place: jax.Array
    sent: jax.Array
    arriving: jax.Array
    longest: jax.Array


class Window(NamedTuple):
    """The rows of a round.

    Attributes:
      pair: i32[P*c], the (token, choice) pair in each row that is sent; n*K in a row without one.
      slot: i32[n,K], the row of each pair; P*c if another round serves it.
      sent, received: i32[P], rows in use of what goes to, and comes from, each peer.
      order, inverse: i32[P*c], what sorts the received rows by expert, unused ones last.
      group_sizes: i32[e], received rows of each expert.
    """

    pair: jax.Array
    slot: jax.Array
    sent: jax.Array
    received: jax.Array
    order: jax.Array
    inverse: jax.Array
    group_sizes: jax.Array


@jax.named_scope("sort")
def routing_of(choices: jax.Array, experts: int, peers: int) -> Routing:
    """Counts and sorts the choices of a device, and tells the peers how many rows they get.

    Args:
      choices: i32[...,K] of each token among all experts, or P*e for none.
      experts: e.
      peers: P.
    """
    choices = choices.reshape(-1, choices.shape[-1])
    chosen = choices.reshape(-1)
    counts = jnp.sum(chosen[:, None] == jnp.arange(peers * experts), axis=0, dtype=jnp.int32)
    arriving = counts.reshape(peers, experts)
    sent = arriving.sum(1)
    order = jnp.argsort(chosen)
    peer = choices // experts
    first = jnp.cumsum(sent) - sent
    place = jnp.argsort(order).reshape(choices.shape) - first[jnp.minimum(peer, peers - 1)]
    longest = sent.max()
    if peers > 1:
        arriving = jax.lax.all_to_all(arriving, "expert", 0, 0, tiled=True)
        # All devices take as many turns, whether or not a platform's collectives need more of them
        # than the peers.
        longest = jax.lax.pmax(longest, AXES)
    return Routing(order, peer, place, sent, arriving, longest)


@jax.named_scope("sort")
def window_of(routing: Routing, begin: jax.Array | int, rows: int) -> Window:
    """The round of the rows from `begin` to `begin + rows` for each peer."""
    peers, experts = routing.arriving.shape
    row = jnp.arange(rows)
    sent = jnp.clip(routing.sent - begin, 0, rows)
    first = jnp.cumsum(routing.sent) - routing.sent
    pair = routing.order[first[:, None] + begin + row]
    pair = jnp.where(row < sent[:, None], pair, len(routing.order)).reshape(-1)

    place = routing.place - begin
    is_served = (routing.peer < peers) & (place >= 0) & (place < rows)
    slot = jnp.where(is_served, routing.peer * rows + place, peers * rows)

    ends = jnp.clip(jnp.cumsum(routing.arriving, axis=1) - begin, 0, rows)
    expert = jnp.sum(row[:, None] >= ends[:, None], axis=-1).reshape(-1)  # e in unused rows
    group_sizes = jnp.sum(expert[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    # one peer's rows are sorted already
    order = jnp.argsort(expert) if peers > 1 else jnp.arange(rows)
    inverse = jnp.argsort(order) if peers > 1 else order
    return Window(pair, slot, sent, ends[:, -1], order, inverse, group_sizes)


def rows_of_rounds(tokens: int, choices: int, peers: int, experts: int) -> tuple[int, int]:
    """Rows that a pair of peers exchanges in the first round, and in each of the later ones.

    Args:
      tokens: n.
      choices: K.
      peers: P.
      experts: e.

    Returns:
      (c of the first round, c of the others); the latter is 0 if the first one serves all rows
      whatever the routing.
    """
    most = tokens * min(choices, experts)
    first = _tiles(SLACK * tokens * choices / peers)
    return (most, 0) if first >= most else (first, _tiles(first / LATER))


def _tiles(rows: float) -> int:
    return max(1, math.ceil(rows / TILE)) * TILE
