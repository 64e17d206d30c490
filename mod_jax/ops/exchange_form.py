"""How devices of the mesh axis `expert` exchange rows: the form that a mesh allows, by its name.

Axes: P peers along the mesh axis `expert`, c rows for each of them, D width.

- "local": there is one peer, so nothing is sent.
- "ragged": `jax.lax.ragged_all_to_all`, which sends the rows that there are.
- "capacity": a dense all-to-all, in which every pair of peers exchanges c rows, unused ones
  included. It exists everywhere.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh


def exchange_form(mesh: Mesh | AbstractMesh) -> str:
    """The form for the devices of a mesh: "local", "ragged" or "capacity".

    CPUs have no ragged all-to-all. On TPU v5e with more than 4x4 chips XLA refuses it: "Ragged
    all-to-all is currently not supported in limited ICI routing settings".
    """
    if mesh.empty or mesh.shape["expert"] == 1:
        return "local"
    device = mesh.abstract_mesh.abstract_device
    kind = jax.default_backend() if device is None else device.device_kind
    is_limited = kind == "TPU v5 lite" and mesh.size > 16
    return "capacity" if kind == "cpu" or is_limited else "ragged"


@jax.named_scope("exchange")
def swap(form: str, rows: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
    """Swaps rows with all peers, within `jax.shard_map`.

    Args:
      form: From `exchange_form`.
      rows: f[P*c,D], c rows for each peer, or numbers f[P*c].
      sent: i32[P], how many rows for each peer are in use; the first ones.
      received: i32[P], how many rows of each peer are in use.

    Returns:
      f[P*c,D] or f[P*c], c rows from each peer. Those that are not in use are 0 if they were 0 in
      `rows`.
    """
    if form == "local":
        return rows
    # A single number for each row is little to send, and the ragged form moves rows.
    if form == "capacity" or rows.ndim == 1:
        return jax.lax.all_to_all(rows, "expert", 0, 0, tiled=True)
    return _ragged(rows, sent, received)


@jax.custom_vjp
def _ragged(rows: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
    # equivalent to: the gradient that ragged_all_to_all has by itself, which keeps more
    c = len(rows) // len(sent)
    first = c * jnp.arange(len(sent), dtype=sent.dtype)
    here = jnp.full_like(sent, c * jax.lax.axis_index("expert"))  # in the results of each peer
    return jax.lax.ragged_all_to_all(
        rows, jnp.zeros_like(rows), first, sent, here, received, axis_name="expert"
    )


_ragged.defvjp(
    lambda rows, sent, received: (_ragged(rows, sent, received), (sent, received)),
    lambda sizes, dy: (_ragged(dy, *reversed(sizes)), None, None),
)
