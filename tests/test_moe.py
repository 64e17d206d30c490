"""The sparse layer: against a loop over tokens and choices in torch float64, and over meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mod_jax.config import ConfigError, DecoderConfig, MeshConfig, MoEConfig
from mod_jax.models.moe import MoE, MoEAux, within_capacity
from mod_jax.sharding import ROWS, make_mesh, parameter_shardings

D, F = 16, 24
OPTIONS = {
    "dropless": MoEConfig(),
    "one choice": MoEConfig(experts_per_token=1),
    "one choice by its probability": MoEConfig(experts_per_token=1, norm_topk_prob=False),
    "two choices by their probabilities": MoEConfig(norm_topk_prob=False),
    "capacity": MoEConfig(capacity_factor=0.4),
    "capacity, by probabilities": MoEConfig(capacity_factor=0.4, norm_topk_prob=False),
    "roomy capacity": MoEConfig(capacity_factor=1.5),
    "residual": MoEConfig(residual=True),
    "capacity and residual": MoEConfig(capacity_factor=0.4, residual=True),
}


def layer(moe):
    """A sparse layer with random parameters, of which `inputs` prefer expert 0.

    Returns:
      (graph, state, parameters by name, logical axes by name).
    """
    config = DecoderConfig(hidden_size=D, intermediate_size=F, moe=moe)
    graph, state = nnx.split(MoE(config, (), nnx.Rngs(0)))
    params = {".".join(path): leaf for path, leaf in nnx.to_flat_state(state)}
    values = {
        name: jax.random.normal(jax.random.key(n), leaf.shape) * 0.4
        for n, (name, leaf) in enumerate(sorted(params.items()))
    }
    values["router.w_de"] = values["router.w_de"].at[0].set(2 * jnp.eye(1, moe.num_experts)[0])
    return graph, state, values, {name: leaf.axes for name, leaf in params.items()}


def bind(graph, state, values):
    """The layer with the parameters `values`."""
    flat = [(path, leaf.replace(values[".".join(path)])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def inputs(B=8, S=8):
    """Random (x, valid, cotangent of the output); rows are padded by 0 to S positions."""
    x, dy = jax.random.normal(jax.random.key(7), (2, B, S, D))
    x = x.at[..., 0].set(1)
    valid = jnp.arange(S) < jnp.array([S, S - 3, 0, S, 1, S, S - 1, S])[:B, None]
    return x, valid, dy


def objective(graph, state, values, x, valid, dy):
    """A scalar that depends on every differentiable output, and the outputs."""
    y, aux = bind(graph, state, values)(x, valid)
    return jnp.sum(y * dy) + 3 * aux.balance + 0.1 * aux.z, (y, aux)


def compute(moe, x, valid, dy, values=None):
    """Outputs of the layer, and gradients of `objective` in its input and parameters, by name."""
    graph, state, own, _ = layer(moe)
    on_layer = functools.partial(objective, graph, state)
    run = jax.jit(jax.value_and_grad(on_layer, argnums=(0, 1), has_aux=True))
    (_, (y, aux)), (dvalues, dx) = run(values or own, x, valid, dy)
    return {
        "y": y,
        "balance": aux.balance,
        "z": aux.z,
        "load": aux.load,
        "dx": dx,
        **{f"d {name}": g for name, g in dvalues.items()},
    }


def swiglu(x, gate, up, down):
    return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down


def by_tokens(moe, values, x, valid, dy):
    """The method one token and one choice at a time, in torch float64.

    Returns:
      (what `compute` returns, the set of the valid tokens' fates: for each choice, whether its
      expert had a place for the token).
    """
    p = {
        name: torch.tensor(np.asarray(v), dtype=torch.float64, requires_grad=True)
        for name, v in values.items()
    }
    x, dy = (torch.tensor(np.asarray(a), dtype=torch.float64) for a in (x, dy))
    x.requires_grad_()
    tokens, E, K = x.reshape(-1, D), moe.num_experts, moe.experts_per_token
    real = [t for t, v in enumerate(np.asarray(valid).reshape(-1)) if v]
    logits = tokens @ p["router.w_de"]
    probabilities = torch.softmax(logits, -1)
    choices = {t: sorted(range(E), key=lambda e: -probabilities[t, e].item())[:K] for t in real}
    places = math.inf
    if moe.capacity_factor:
        places = math.ceil(K * moe.capacity_factor * len(tokens) / E)
    load, kept = [0] * E, {t: [] for t in real}
    for k in range(K):
        for t in real:
            if load[choices[t][k]] < places:
                load[choices[t][k]] += 1
                kept[t].append(choices[t][k])
    experts = [
        [p[f"experts.{name}"][e] for name in ("gate.w_edf", "up.w_edf", "down.w_efd")]
        for e in range(E)
    ]
    outputs = []
    for t in range(len(tokens)):
        y = torch.zeros(D, dtype=torch.float64)
        for e in kept.get(t, []):
            total = sum(probabilities[t, other] for other in kept[t])
            share = probabilities[t, e] / (total if moe.norm_topk_prob else 1)
            y = y + share * swiglu(tokens[t], *experts[e])
        if moe.residual and t in kept:
            mix = torch.softmax(tokens[t] @ p["residual.mix.w_d2"] + p["residual.mix.b_2"], -1)
            dense = [p[f"residual.{name}"] for name in ("gate.w_df", "up.w_df", "down.w_fd")]
            y = mix[0] * y + mix[1] * swiglu(tokens[t], *dense)
        outputs.append(y)
    y = torch.stack(outputs).reshape(x.shape)
    first_choices = torch.tensor([choices[t][0] for t in real])
    first = torch.nn.functional.one_hot(first_choices, E).double()
    balance = E * torch.sum(probabilities[real].mean(0) * first.mean(0))
    z = (torch.logsumexp(logits[real], -1) ** 2).mean()
    (torch.sum(y * dy) + 3 * balance + 0.1 * z).backward()
    gradients = {f"d {name}": v.grad for name, v in p.items()} | {"dx": x.grad}
    results = {"y": y, "balance": balance, "z": z, "load": torch.tensor(load), **gradients}
    return {name: v.detach().numpy() for name, v in results.items()}, {
        tuple(e in kept[t] for e in choices[t]) for t in real
    }


def assert_close(ours, expected, tolerance=1e-5):
    """Each array differs by at most `tolerance` of its largest absolute value, or of 1."""
    assert ours.keys() == expected.keys()
    for name in expected:
        scale = max(1.0, np.abs(expected[name]).max())
        np.testing.assert_allclose(
            ours[name] / scale, expected[name] / scale, atol=tolerance, rtol=0, err_msg=name
        )


@pytest.mark.parametrize("moe", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_are_those_of_the_loop_over_tokens(moe):
    given = inputs()
    expected, _ = by_tokens(moe, layer(moe)[2], *given)
    assert_close(compute(moe, *given), expected)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_the_router_learns_from_the_task_only_if_its_weights_can_change(norm_topk_prob):
    """With one choice, a weight divided by itself is 1 whatever the router says."""
    moe = MoEConfig(experts_per_token=1, norm_topk_prob=norm_topk_prob)
    graph, state, values, _ = layer(moe)
    x, valid, dy = inputs()

    def task(values):
        return jnp.sum(bind(graph, state, values)(x, valid)[0] * dy)

    gradient = jax.jit(jax.grad(task))(values)["router.w_de"]
    assert bool(np.abs(gradient).max() > 1e-3) is not norm_topk_prob


def test_one_choice_with_renormalisation_cannot_be_trained():
    message = (
        r"experts_per_token = 1: expected at least 2 with norm_topk_prob.*norm_topk_prob=False"
    )
    with pytest.raises(ConfigError, match=message):
        MoEConfig(experts_per_token=1).require_router_that_learns()
    MoEConfig(experts_per_token=1, norm_topk_prob=False).require_router_that_learns()
    MoEConfig(experts_per_token=2).require_router_that_learns()


def test_a_dense_decoder_has_no_sparse_layer():
    with pytest.raises(ValueError, match=r"decoder\.moe = None: expected a MoEConfig"):
        MoE(DecoderConfig(), (), nnx.Rngs(0))


def test_tight_capacity_drops_first_second_and_both_choices():
    """Every fate occurs, so the case "capacity" above tests the whole rule."""
    _, fates = by_tokens(OPTIONS["capacity"], layer(OPTIONS["capacity"])[2], *inputs())
    assert fates == {(True, True), (False, True), (True, False), (False, False)}


def test_first_choices_take_their_places_before_any_second_choice():
    choices = jnp.array([[[1, 0], [1, 0], [0, 1], [0, 1], [2, 0]]])
    valid = jnp.array([[True, True, False, True, True]])
    kept = within_capacity(choices, valid, num_experts=3, places=2)
    # Expert 0 takes the first choice of token 3, then the second of token 0; those of 1 and 4 come
    # too late. Expert 1 is full with the first choices of tokens 0 and 1.
    assert (kept & valid[..., None]).tolist() == [
        [[True, True], [True, False], [False, False], [True, False], [True, False]]
    ]


def test_all_tokens_may_want_one_expert():
    moe = OPTIONS["dropless"]
    x, valid, dy = inputs()
    x = x.at[..., 0].set(10)
    values = dict(layer(moe)[2])
    values["router.w_de"] = values["router.w_de"].at[0, 2].set(5.0)
    ours = compute(moe, x, valid, dy, values)
    assert ours["load"][2] == valid.sum()
    assert_close(ours, by_tokens(moe, values, x, valid, dy)[0])


def test_padding_alone_gives_zeros():
    x, valid, dy = inputs()
    ours = compute(OPTIONS["capacity and residual"], x, jnp.zeros_like(valid), dy)
    assert all(not np.any(value) for value in ours.values())


def test_the_contents_of_padding_change_nothing():
    x, valid, dy = inputs()
    other = jnp.where(valid[..., None], x, 5 * dy)
    first, second = (compute(OPTIONS["capacity and residual"], a, valid, dy) for a in (x, other))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_the_router_decides_in_float32_under_bfloat16_activations():
    graph, state, values, _ = layer(OPTIONS["dropless"])
    x, valid, _ = inputs()
    y, aux = bind(graph, state, values)(x.astype(jnp.bfloat16), valid)
    _, exact = bind(graph, state, values)(x.astype(jnp.bfloat16).astype(jnp.float32), valid)
    assert y.dtype == jnp.bfloat16
    assert jax.tree.leaves(jax.tree.map(lambda a: a.dtype == jnp.float32, aux)) == [True] * 3
    np.testing.assert_array_equal(aux.z, exact.z)
    np.testing.assert_array_equal(aux.load, exact.load)


def test_float32_products_are_not_left_to_the_default_of_a_tpu():
    """It rounds factors to bfloat16; on a CPU only the program shows what is asked for."""
    graph, state, values, _ = layer(OPTIONS["residual"])
    x, valid, _ = inputs()
    program = str(jax.make_jaxpr(bind(graph, state, values))(x.astype(jnp.bfloat16), valid))
    # of the router, the mixture, and three means: probabilities, first choices, z
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 5


def test_even_routing_has_balance_one():
    """Even probabilities and even first choices give the minimum of the balance loss."""
    graph, state, values, _ = layer(MoEConfig(experts_per_token=1))
    values["router.w_de"] = jnp.zeros((D, 4)).at[:4, :4].set(100 * jnp.eye(4))
    x = jnp.tile(jnp.eye(4, D), (2, 2, 1))
    _, aux = bind(graph, state, values)(x, jnp.ones((2, 8), bool))
    assert isinstance(aux, MoEAux)
    np.testing.assert_allclose(aux.balance, 1, rtol=1e-6)
    np.testing.assert_array_equal(aux.load, [4, 4, 4, 4])


MESHES = {
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "fsdp 2, expert 4": MeshConfig(data=1, fsdp=2, expert=4),
    "data 2, expert 2, tensor 2": MeshConfig(data=2, expert=2, tensor=2),
    "expert 8": MeshConfig(data=1, expert=8),
}


@pytest.fixture(scope="module")
def alone():
    """Eight experts with every option, without a mesh."""
    moe = dataclasses.replace(OPTIONS["capacity and residual"], num_experts=8)
    return moe, compute(moe, *inputs())


@pytest.mark.parametrize("config", MESHES.values(), ids=MESHES)
def test_the_mesh_changes_nothing(config, alone):
    """Neither outputs, losses, the choices dropped nor gradients.

    The dropless layer is tested in test_expert_exchange.
    """
    moe, expected = alone
    _, _, values, axes = layer(moe)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        placed = jax.device_put(values, parameter_shardings(mesh, values, axes))
        rows = jax.device_put(inputs(), NamedSharding(mesh, PartitionSpec(ROWS)))
        assert_close(compute(moe, *rows, placed), expected)
