"""The multimodal model: from pictures and tokens to hidden states; its flat parameters."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from mod_jax.batch import Batch
from mod_jax.config import DecoderConfig, MeshConfig, ModelConfig, MoEConfig, VisionConfig
from mod_jax.models import llava
from mod_jax.models.parameters import constant
from mod_jax.models.vision import LayerNorm, patchify
from mod_jax.sharding import RULES, make_mesh, parameter_shardings, row_sharding

CLIP = VisionConfig(
    image_size=12, patch_size=6, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=2
)
SIGLIP = dataclasses.replace(CLIP, family="siglip", hidden_act="gelu_tanh", feature_layer=-1)
DECODER = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    moe=MoEConfig(),
)
CONFIG = ModelConfig(CLIP, DECODER)
DENSE = dataclasses.replace(CONFIG, decoder=dataclasses.replace(DECODER, moe=None))
ROWS, LENGTH, FEATURES = 2, 10, 4


@functools.cache
def params_of(config):
    return jax.jit(functools.partial(llava.init, config))(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, batch):
    return llava.bind(config, params)(batch)


@functools.partial(jax.jit, static_argnums=0)
def tower(config, params, images):
    return llava.bind(config, params).vision_tower(images)


def random_images(*leading, size=12):
    return jax.random.randint(jax.random.key(2), (*leading, size, size, 3), 0, 256).astype(
        jnp.uint8
    )


def make_batch(pictures=2, rows=ROWS):
    """A batch in which row 0 shows its last picture at positions 2..5; other rows are text."""
    tokens = jax.random.randint(jax.random.key(1), (rows, LENGTH), 0, 64)
    index = jnp.full((rows, LENGTH), -1)
    if pictures:
        index = index.at[0, 2 : 2 + FEATURES].set(FEATURES * (pictures - 1) + jnp.arange(FEATURES))
    zeros, ones = jnp.zeros_like(tokens), jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    images = random_images(rows, pictures)
    return Batch(
        tokens,
        tokens,
        ones.astype(jnp.float32),
        positions,
        ones,
        zeros,
        index,
        images,
        jnp.zeros((rows, 1), jnp.int32),
    )


def test_patches_are_what_a_strided_convolution_sees():
    """Also where the patches leave a border: 14 pixels hold two patches of 6."""
    images = np.random.default_rng(0).normal(size=(2, 14, 14, 3))
    kernel = np.random.default_rng(1).normal(size=(6, 6, 3, 5))
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(images).permute(0, 3, 1, 2),
        torch.from_numpy(kernel).permute(3, 2, 0, 1),
        stride=6,
    )
    found = patchify(jnp.asarray(images), 6) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(
        found, expected.flatten(2).transpose(1, 2).numpy(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("vision, runs", [(CLIP, 2), (SIGLIP, 3)], ids=["clip -2", "siglip -1"])
def test_layers_after_the_feature_are_not_run(vision, runs):
    """NaNs in the layers after the feature's do no harm; NaNs in its own do."""
    config = dataclasses.replace(CONFIG, vision=vision)
    params = params_of(config)
    name = "vision_tower.layers.mlp.up.w_df"
    images = random_images(1)

    def features(first_broken):
        return tower(config, {**params, name: params[name].at[first_broken:].set(jnp.nan)}, images)

    assert features(runs).shape == (1, FEATURES, 24) and bool(jnp.isfinite(features(runs)).all())
    assert not bool(jnp.isfinite(features(runs - 1)).any())


def test_layer_norm_takes_its_statistics_in_float32():
    """Compared with torch in float64; the tolerance is the rounding of the result alone.

    The mean is far from 0, so that a bfloat16 mean, or a difference from it, would be far off.
    """
    random = np.random.default_rng(0)
    x = jnp.asarray(50 + random.normal(size=(3, 4096)), jnp.bfloat16)
    norm = LayerNorm((), 4096, 1e-5)
    scale, bias = (random.normal(size=4096).astype(np.float32) for _ in range(2))
    norm.scale_d[...], norm.bias_d[...] = jnp.asarray(scale), jnp.asarray(bias)
    x64, scale64, bias64 = (
        torch.tensor(np.asarray(a, np.float64), dtype=torch.float64) for a in (x, scale, bias)
    )
    expected = torch.nn.functional.layer_norm(x64, (4096,), scale64, bias64, 1e-5).numpy()
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(norm(x), np.float64), expected, rtol=2**-8, atol=1e-5)


def test_every_picture_is_seen_alone():
    images = random_images(2, 3)
    together = tower(CONFIG, params_of(CONFIG), images)
    alone = tower(CONFIG, params_of(CONFIG), images[1, 2])
    assert together.shape == (2, 3, FEATURES, 24)
    np.testing.assert_allclose(together[1, 2], alone, rtol=1e-4, atol=1e-5)


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"16, 16, 3.*12, 12, 3"):
        llava.bind(CONFIG, params_of(CONFIG)).vision_tower(random_images(1, size=16))


def test_a_picture_token_takes_the_adapted_feature_it_points_at():
    model, batch = llava.bind(CONFIG, params_of(CONFIG)), make_batch()
    features = model.features(batch.images)
    assert features.shape == (ROWS, 2 * FEATURES, 24)
    x = model.embed(batch.tokens, batch.picture_index, features)
    params = {name: np.asarray(a, np.float64) for name, a in params_of(CONFIG).items()}
    inner = (
        np.asarray(features[0, FEATURES:], np.float64) @ params["adaptor.linear_1.w_io"]
        + params["adaptor.linear_1.b_o"]
    )
    inner = torch.nn.functional.gelu(torch.from_numpy(inner)).numpy()
    adapted = inner @ params["adaptor.linear_2.w_io"] + params["adaptor.linear_2.b_o"]
    np.testing.assert_allclose(x[0, 2 : 2 + FEATURES], adapted, rtol=1e-4, atol=1e-5)
    text = np.asarray(batch.picture_index) < 0
    embedding = np.asarray(params_of(CONFIG)["language_model.embedding.w_vd"])
    np.testing.assert_array_equal(np.asarray(x)[text], embedding[np.asarray(batch.tokens)[text]])


def test_a_picture_nobody_points_at_changes_nothing():
    batch = make_batch()
    other = dataclasses.replace(batch, images=batch.images.at[0, 0].set(0).at[1].set(255))
    np.testing.assert_array_equal(
        run(CONFIG, params_of(CONFIG), batch)[0], run(CONFIG, params_of(CONFIG), other)[0]
    )


def test_features_computed_once_serve_as_the_pictures():
    model, batch = llava.bind(CONFIG, params_of(CONFIG)), make_batch()
    hidden, aux = model(
        dataclasses.replace(batch, images=jnp.zeros_like(batch.images)),
        model.features(batch.images),
    )
    np.testing.assert_allclose(
        hidden, run(CONFIG, params_of(CONFIG), batch)[0], rtol=1e-4, atol=1e-5
    )
    assert hidden.shape == (ROWS, LENGTH, 32) and aux.load.shape == (2, 4)


def test_rows_without_pictures_are_text():
    """Without pictures, neither tower nor adaptor runs: their parameters may be anything."""
    text, params = make_batch(pictures=0), params_of(DENSE)
    broken = {
        name: a if name.startswith("language_model") else jnp.full_like(a, jnp.nan)
        for name, a in params.items()
    }
    unused = dataclasses.replace(make_batch(), picture_index=text.picture_index)
    hidden, aux = run(DENSE, broken, text)
    np.testing.assert_allclose(hidden, run(DENSE, params, unused)[0], rtol=1e-4, atol=1e-5)
    assert llava.bind(DENSE, params).features(text.images).shape == (ROWS, 0, 24)
    assert aux.balance.shape == aux.z.shape == (0,)


NAMES = {
    "adaptor.linear_1.w_io": (24, 32),
    "language_model.embedding.w_vd": (64, 32),
    "language_model.norm.scale_d": (32,),
    "language_model.layers.attention_norm.scale_d": (4, 32),
    "language_model.layers.attention.query.w_dnh": (4, 32, 4, 8),
    "language_model.layers.attention.key.b_kh": (4, 2, 8),
    "language_model.layers.attention.out.w_nhd": (4, 4, 8, 32),
    "language_model.layers.mlp_norm.scale_d": (4, 32),
    "language_model.layers.mlp.gate.w_df": (2, 32, 48),
    "language_model.layers.moe.router.w_de": (2, 32, 4),
    "language_model.layers.moe.experts.down.w_efd": (2, 4, 48, 32),
    "vision_tower.class_embedding_d": (24,),
    "vision_tower.patches.w_pd": (108, 24),
    "vision_tower.positions.w_td": (5, 24),
    "vision_tower.pre_norm.bias_d": (24,),
    "vision_tower.layers.attention.value.b_nh": (3, 2, 12),
    "vision_tower.layers.mlp.up.b_f": (3, 40),
    "vision_tower.post_norm.scale_d": (24,),
}


def test_parameters_are_named_as_the_architecture_says():
    shapes = {name: array.shape for name, array in llava.abstract(CONFIG).items()}
    assert NAMES.items() <= shapes.items()
    assert not any(".moe." in name for name in llava.abstract(DENSE))
    other = llava.abstract(OTHER)
    assert not any("_tower.pre_norm" in name for name in other)
    assert other["vision_tower.patches.b_d"].shape == (24,)
    assert "language_model.head.w_vd" in other


OTHER = ModelConfig(
    SIGLIP,
    dataclasses.replace(
        DECODER, qk_norm=True, qkv_bias=False, tie_embeddings=False, moe=MoEConfig(residual=True)
    ),
)


@pytest.mark.parametrize(
    "config", [CONFIG, DENSE, OTHER], ids=["clip-sparse", "clip-dense", "siglip-residual"]
)
def test_init_abstract_and_axes_agree(config):
    params, shapes, axes = params_of(config), llava.abstract(config), llava.axes(config)
    assert {n: (a.shape, a.dtype) for n, a in params.items()} == {
        n: (a.shape, a.dtype) for n, a in shapes.items()
    }
    assert {a.dtype for a in shapes.values()} == {jnp.dtype("float32")}
    assert {n: len(a.shape) for n, a in shapes.items()} == {n: len(a) for n, a in axes.items()}
    assert {axis for dims in axes.values() for axis in dims} <= set(RULES)
    assert all(name.rsplit(".", 1)[1].rsplit("_", 1)[1] for name in shapes)


def test_init_depends_on_the_key_alone():
    again = llava.init(DENSE, jax.random.key(0))
    other = llava.init(DENSE, jax.random.key(1))
    for name, array in params_of(DENSE).items():
        np.testing.assert_allclose(array, again[name], rtol=1e-6)
        assert array.std() == 0 or not np.allclose(array, other[name])


def test_bind_names_what_does_not_fit():
    params = dict(params_of(DENSE))
    params["adaptor.linear_3.w_io"] = params.pop("adaptor.linear_2.w_io")
    with pytest.raises(
        ValueError,
        match=r"missing \['adaptor.linear_2.w_io'\], unknown \['adaptor.linear_3.w_io'\]",
    ):
        llava.bind(DENSE, params)


def test_bind_uses_the_parameters_it_is_given():
    params = params_of(OTHER)
    for name, leaf in nnx.to_flat_state(nnx.state(llava.bind(OTHER, params))):
        assert leaf[...] is params[".".join(name)]


def test_a_parameter_needs_an_axis_for_each_dimension():
    with pytest.raises(ValueError, match="one logical axis for each dimension"):
        constant((2,), (3, 4), ("embed",), 0.0)


@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["tied", "untied"])
def test_the_head_is_the_embedding_where_they_are_tied(config):
    params = params_of(config)
    head = llava.head(config, params)
    tied = np.array_equal(head, params["language_model.embedding.w_vd"])
    assert head.shape == (64, 32) and tied == config.decoder.tie_embeddings


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["sparse", "dense"])
def test_bfloat16_stays_near_float32(config):
    low = run(dataclasses.replace(config, dtype="bfloat16"), params_of(config), make_batch())[0]
    high = run(config, params_of(config), make_batch())[0]
    assert low.dtype == jnp.bfloat16
    assert float(jnp.abs(low.astype(jnp.float32) - high).mean()) < 0.05 * float(
        jnp.abs(high).mean()
    )


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["sparse", "dense"])
def test_a_mesh_changes_no_result(config):
    """Neither values nor gradients, with parameters over fsdp and tensor and rows over fsdp."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch, params = make_batch(rows=4), params_of(config)

    @jax.jit
    def loss_and_gradients(params, batch):
        return jax.value_and_grad(
            lambda params: (llava.bind(config, params)(batch)[0] ** 3).mean()
        )(params)

    expected = loss_and_gradients(params, batch)
    with jax.set_mesh(mesh):
        placed = jax.device_put(
            params, parameter_shardings(mesh, llava.abstract(config), llava.axes(config))
        )
        found = loss_and_gradients(placed, jax.device_put(batch, row_sharding(mesh)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected
    )


def test_the_tower_and_the_adaptor_send_nothing_but_weights():
    """Their pictures stay split by rows: forward, no device needs more than weights of others."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    params = params_of(DENSE)
    batch = make_batch(rows=8)

    def pictures(params, images):
        model = llava.bind(DENSE, params)
        features = model.features(images)
        return model.embed(batch.tokens, batch.picture_index, features)

    with jax.set_mesh(mesh):
        shardings = parameter_shardings(mesh, params, llava.axes(DENSE))
        compiled = jax.jit(pictures, in_shardings=(shardings, row_sharding(mesh)))
        text = compiled.lower(params, batch.images).compile().as_text()
    sent = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(.*op_name=\"([^\"]*)\"", text)
    assert {kind for kind, name in sent if "embedding" not in name} == {"all-gather"}
    assert all("gather_weight" in name or "embedding" in name for _, name in sent)
