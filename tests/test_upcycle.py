"""Upcycling: the sparse model has its config's parameters and computes what the dense one did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_jax.batch import Batch
from mod_jax.config import ConfigError, DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from mod_jax.models import llava
from mod_jax.models.upcycle import upcycle

DENSE = ModelConfig(
    vision=VisionConfig(
        image_size=28,
        patch_size=14,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
    ),
    decoder=DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    ),
    image_token_id=60,
    end_token_id=61,
)
LAYERS = "language_model.layers."
ROOMY = 2.0  # capacity factor at which all tokens may go to the same two of four experts

OPTIONS = {
    "every second layer": MoEConfig(),
    "first half": MoEConfig(layers="first_half"),
    "all": MoEConfig(layers="all"),
    "explicit": MoEConfig(layers=(3, 0)),
    "residual": MoEConfig(residual=True),
    "three of five": MoEConfig(num_experts=5, experts_per_token=3),
    "capacity": MoEConfig(capacity_factor=ROOMY),
    "capacity and residual": MoEConfig(capacity_factor=ROOMY, residual=True),
}


@pytest.fixture(scope="module")
def dense():
    return llava.init(DENSE, jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    """Two rows of text, one with padding; each has a black picture that no token shows."""
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 60)
    segments = jnp.stack([jnp.ones(12, jnp.int32), (jnp.arange(12) < 9).astype(jnp.int32)])
    row = jnp.broadcast_to(jnp.arange(12), (2, 12))
    return Batch(
        tokens=tokens,
        targets=tokens,
        loss_weights=segments.astype(jnp.float32),
        positions=row,
        segment_ids=segments,
        branch_ids=jnp.zeros_like(row),
        picture_index=jnp.full_like(row, -1),
        images=jnp.zeros((2, 1, 28, 28, 3), jnp.uint8),
        samples=jnp.zeros((2, 1), jnp.int32),
    )


def hidden_states(config, params, batch):
    return jax.jit(lambda params, batch: llava.bind(config, params)(batch))(params, batch)


@pytest.mark.parametrize("moe", OPTIONS.values(), ids=OPTIONS)
def test_names_and_shapes_are_those_of_the_sparse_config(moe, dense):
    params, config = upcycle(dense, DENSE, moe, jax.random.key(2))
    assert config.decoder.moe == moe
    assert {name: (a.shape, a.dtype) for name, a in params.items()} == {
        name: (a.shape, a.dtype) for name, a in llava.abstract(config).items()
    }


@pytest.mark.parametrize(
    "option", ["every second layer", "all", "explicit", "three of five", "capacity and residual"]
)
def test_the_sparse_model_computes_what_the_dense_one_did(option, dense, batch):
    params, config = upcycle(dense, DENSE, OPTIONS[option], jax.random.key(2))
    expected, _ = hidden_states(DENSE, dense, batch)
    ours, aux = hidden_states(config, params, batch)
    real = batch.segment_ids > 0
    np.testing.assert_allclose(ours[real], expected[real], atol=1e-5)
    np.testing.assert_array_equal(aux.load.sum(1), 21 * config.decoder.moe.experts_per_token)


def test_experts_are_copies_of_the_layer_they_replace(dense):
    params, _ = upcycle(dense, DENSE, MoEConfig(layers=(1, 3), residual=True), jax.random.key(2))
    for name, expert_name in [
        ("gate.w_df", "gate.w_edf"),
        ("up.w_df", "up.w_edf"),
        ("down.w_fd", "down.w_efd"),
    ]:
        before = dense[f"{LAYERS}mlp.{name}"]
        for place, number in enumerate((1, 3)):
            np.testing.assert_array_equal(
                params[f"{LAYERS}moe.residual.{name}"][place], before[number]
            )
            for expert in params[f"{LAYERS}moe.experts.{expert_name}"][place]:
                np.testing.assert_array_equal(expert, before[number])
        np.testing.assert_array_equal(params[f"{LAYERS}mlp.{name}"], before[jnp.array([0, 2])])


def test_everything_else_stays_and_the_dense_parameters_are_not_touched(dense):
    before = {name: np.asarray(a) for name, a in dense.items()}
    params, _ = upcycle(dense, DENSE, MoEConfig(), jax.random.key(2))
    assert dense.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(dense[name], value)
        if not name.startswith(LAYERS + "mlp."):
            np.testing.assert_array_equal(params[name], value)


def test_routers_are_uniform_and_differ_between_layers(dense):
    params, _ = upcycle(dense, DENSE, MoEConfig(layers="all", num_experts=64), jax.random.key(2))
    router, bound = params[LAYERS + "moe.router.w_de"], 32**-0.5
    assert np.abs(router).max() < bound
    # The standard deviation of U(-a, a) is a / sqrt(3); 8192 draws give it within about 0.5 %.
    np.testing.assert_allclose(router.std(), bound / 3**0.5, rtol=0.03)
    np.testing.assert_allclose(router.mean(), 0, atol=0.03 * bound)
    assert not np.allclose(router[0], router[1])


def test_a_sparse_model_is_refused(dense):
    params, config = upcycle(dense, DENSE, MoEConfig(), jax.random.key(2))
    with pytest.raises(ConfigError, match=r"decoder\.moe.*dense decoder"):
        upcycle(params, config, MoEConfig(), jax.random.key(3))


def test_layers_that_do_not_exist_are_refused(dense):
    with pytest.raises(ConfigError, match=r"moe\.layers.*0\.\.3"):
        upcycle(dense, DENSE, MoEConfig(layers=(2, 4)), jax.random.key(2))
