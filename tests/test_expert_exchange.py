"""The expert layer over a mesh.

The exchange moves each row to the device of its expert, and neither values nor gradients depend on
the mesh.

Axes: B rows, S positions, D width, F feed-forward, E experts, K experts per token.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ragged import ragged_all_to_all

from mod_jax.config import ConfigError, MeshConfig
from mod_jax.ops import expert_exchange, expert_windows
from mod_jax.ops.expert_exchange import expert_layer, expert_layer_oracle
from mod_jax.ops.expert_windows import rows_of_rounds
from mod_jax.sharding import ROWS, make_mesh, parameter_shardings

MESHES = {
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "fsdp 2, expert 4": MeshConfig(data=1, fsdp=2, expert=4),
    "data 2, expert 2, tensor 2": MeshConfig(data=2, expert=2, tensor=2),
    "expert 8": MeshConfig(data=1, expert=8),
}
B, S, D, F, E, K = 8, 6, 16, 32, 8, 2
ROUTINGS = ["even", "all to one", "many to none"]


def choose(routing, E=E, K=K):
    """Choices i32[B,S,K] of experts; the number E means none."""
    choices = np.argsort(np.random.default_rng(0).random((B, S, E)), axis=-1)[..., :K]
    if routing == "all to one":
        choices[..., 0] = E - 1
        choices[..., 1:] = E
    if routing == "many to none":
        choices[::2] = E
        choices[:, :3, 1:] = E
    return jnp.array(choices, jnp.int32)


def operands(E=E, K=K):
    """The layer's arguments by name, and a cotangent [B,S,D] of its output."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = {
        "x": (B, S, D),
        "weights": (B, S, K),
        "gate": (E, D, F),
        "up": (E, D, F),
        "down": (E, F, D),
    }
    return {
        name: jax.random.normal(key, shape) * 0.5
        for key, (name, shape) in zip(keys, shapes.items())
    }, jax.random.normal(keys[5], (B, S, D))


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(layer, given, choices, dy):
    def run(g):
        return layer(g["x"], choices, g["weights"], g["gate"], g["up"], g["down"])

    y, pullback = jax.vjp(run, given)
    return {"y": y, **pullback(dy)[0]}


def assert_close(ours, expected):
    assert ours.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(ours[name], expected[name], atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_device_computes_what_the_oracle_does(routing):
    given, dy = operands()
    assert_close(
        with_gradients(expert_layer, given, choose(routing), dy),
        with_gradients(expert_layer_oracle, given, choose(routing), dy),
    )


def on_mesh(mesh, given):
    """The operands placed as in training, so that the program compiled is that of training."""
    weights = {
        "gate": ("expert", "expert_embed", "mlp"),
        "up": ("expert", "expert_embed", "mlp"),
        "down": ("expert", "mlp", "expert_embed"),
    }
    shardings = parameter_shardings(mesh, {name: given[name] for name in weights}, weights)
    return {
        name: jax.device_put(a, shardings.get(name, NamedSharding(mesh, PartitionSpec(ROWS))))
        for name, a in given.items()
    }


@pytest.mark.parametrize("config", MESHES.values(), ids=MESHES)
def test_the_mesh_changes_nothing(config):
    given, dy = operands()
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        placed = on_mesh(mesh, given)
        ours = {
            routing: with_gradients(expert_layer, placed, choose(routing), dy)
            for routing in ROUTINGS
        }
    for routing in ROUTINGS:
        assert_close(ours[routing], with_gradients(expert_layer_oracle, given, choose(routing), dy))


# form, devices along expert, experts of a device, choices of a token
ROUNDS = [("capacity", 8, 2, 1), ("ragged", 4, 1, 2)]
OTHER_ROUNDS = [
    case
    for case in itertools.product(("capacity", "ragged"), (2, 4, 8), (1, 2), (1, 2))
    if case not in ROUNDS
]


def check_rounds(monkeypatch, form, axis, experts, choices_per_token):
    """Rounds of a few rows serve even and uneven routings as the oracle does."""
    monkeypatch.setattr(expert_windows, "TILE", 1)
    monkeypatch.setattr(expert_exchange, "exchange_form", lambda mesh: form)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    E, K = axis * experts, choices_per_token
    given, dy = operands(E, K)
    first, later = rows_of_rounds(B * S // 8, K, axis, experts)
    assert not later or first + later < B * S // 8 * min(K, experts), "two rounds would do"
    mesh = make_mesh(MeshConfig(data=1, fsdp=8 // axis, expert=axis))
    to_last_device = [E - 1 - k if k < experts else E for k in range(K)]
    routings = {routing: choose(routing, E, K) for routing in ROUTINGS}
    routings["all to one device"] = jnp.broadcast_to(jnp.array(to_last_device), (B, S, K))
    with jax.set_mesh(mesh):
        placed = on_mesh(mesh, given)
        layer = functools.partial(expert_layer)  # traced anew for each form
        ours = {name: with_gradients(layer, placed, c, dy) for name, c in routings.items()}
    for name, choices in routings.items():
        assert_close(ours[name], with_gradients(expert_layer_oracle, given, choices, dy))


@pytest.mark.parametrize("case", ROUNDS, ids=str)
def test_rounds_follow_until_all_rows_are_served(case, monkeypatch):
    check_rounds(monkeypatch, *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER_ROUNDS, ids=str)
def test_rounds_of_other_sizes_do_too(case, monkeypatch):
    check_rounds(monkeypatch, *case)


def test_experts_that_do_not_divide_are_refused():
    given, dy = operands()
    six = given | {name: given[name][:6] for name in ("gate", "up", "down")}
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=2, expert=4))),
        pytest.raises(ConfigError, match=r"num_experts = 6.*mesh\.expert 4"),
    ):
        with_gradients(expert_layer, six, choose("even"), dy)


def test_rows_that_do_not_divide_are_refused():
    given, _ = operands()
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=1, expert=8))),
        pytest.raises(ConfigError, match=r"rows = 3.*= 8"),
    ):
        expert_layer(
            given["x"][:3],
            choose("even")[:3],
            given["weights"][:3],
            given["gate"],
            given["up"],
            given["down"],
        )


@pytest.mark.parametrize("axis", [1, 4])
def test_gathered_weights_are_not_kept_for_the_backward_pass(axis, monkeypatch):
    monkeypatch.setattr(expert_windows, "TILE", 1)
    given, _ = operands()
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=8 // axis, expert=axis))):
        saved = jax.eval_shape(
            lambda g: jax.vjp(
                lambda g: expert_layer(
                    g["x"], choose("even"), g["weights"], g["gate"], g["up"], g["down"]
                ),
                g,
            )[1],
            given,
        )
    # the gathered weights of all 8 devices together would be 8 / axis * E * D * F numbers
    assert max(a.size for a in jax.tree.leaves(saved)) < 8 / axis * E * D * F
