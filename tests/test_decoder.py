"""The decoder: scanned layers, packed rows, branches, padding and the cache.

Each is compared with the plain way to compute the same.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mod_jax.config import DecoderConfig, MoEConfig
from mod_jax.models.decoder import Decoder, RMSNorm, rotary_angles, rotate, segments
from mod_jax.models.remat import rematerialised
from mod_jax.ops.attention import attention_oracle
from mod_jax.ops.visibility import visible

DENSE = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    norm_eps=1e-6,
)
SPARSE = dataclasses.replace(DENSE, moe=MoEConfig())
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@functools.cache
def decoder(config, dtype="float32", remat="none"):
    """A decoder with random parameters, biases and norms included: ignoring one changes results."""

    @jax.jit
    def make():
        leaves, structure = jax.tree.flatten(Decoder(config, dtype, remat, nnx.Rngs(0)))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        return jax.tree.unflatten(
            structure,
            [leaf + 0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)],
        )

    return make()


@jax.jit
def run(module, tokens, positions, segment_ids, branch_ids):
    return module(module.embed(tokens), positions, segment_ids, branch_ids)


def tokens_of(rows, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, DENSE.vocab_size)


def plain(tokens):
    """Positions, segments and branches of rows that hold one chat each."""
    return (
        jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        jnp.ones_like(tokens),
        jnp.zeros_like(tokens),
    )


def hidden_of(module, tokens):
    return run(module, tokens, *plain(tokens))[0]


@pytest.mark.parametrize(
    "kinds, expected",
    [
        ("dddd", [("d", 4)]),
        ("mdmdmd", [("md", 3)]),
        ("mdmdm", [("md", 2), ("m", 1)]),
        ("mmmddd", [("m", 3), ("d", 3)]),
        ("dmmdd", [("dm", 1), ("md", 1), ("d", 1)]),
        ("mddd", [("md", 1), ("d", 2)]),
        ("m", [("m", 1)]),
    ],
)
def test_layers_are_cut_into_repeating_blocks(kinds, expected):
    assert segments(tuple(kinds)) == [(tuple(pattern), repeats) for pattern, repeats in expected]


@jax.jit
def layer_by_layer(module, tokens):
    """(hidden states, [MoEAux of each sparse layer]), computed without a scan.

    Layer n has the n-th attention of its stack, and the next feed-forward of its kind.
    """
    positions, segment_ids, branch_ids = plain(tokens)
    x = module.embed(tokens)
    count, found = {"mlp": 0, "moe": 0}, []
    for n in range(module.config.num_layers):
        kind = "moe" if n in module.config.sparse_layers else "mlp"
        attention_norm, attention, mlp_norm = jax.tree.map(
            lambda w, n=n: w[n],
            (module.layers.attention_norm, module.layers.attention, module.layers.mlp_norm),
        )
        query, key, value = attention.project(
            attention_norm(x),
            rotary_angles(positions, module.config.head_dim, module.config.rope_theta),
        )
        x += attention.merge(attention_oracle(query, key, value, visible(segment_ids, branch_ids)))
        ffn = jax.tree.map(lambda w, n=count[kind]: w[n], getattr(module.layers, kind))
        count[kind] += 1
        y, *aux = ffn(mlp_norm(x), segment_ids > 0) if kind == "moe" else (ffn(mlp_norm(x)),)
        found += aux
        x += y
    return module.norm(x), found


@pytest.mark.parametrize("layers", [None, "sparse", "first_half", (1, 2)])
def test_scanned_blocks_equal_one_layer_after_the_other(layers):
    config = dataclasses.replace(DENSE, num_layers=5, moe=layers and MoEConfig(layers=layers))
    module, tokens = decoder(config), tokens_of(2, 7)
    hidden, aux = run(module, tokens, *plain(tokens))
    expected, each = layer_by_layer(module, tokens)
    np.testing.assert_allclose(hidden, expected, **CLOSE)
    sparse = len(config.sparse_layers)
    assert aux.balance.shape == aux.z.shape == (sparse,)
    assert aux.load.shape[0] == sparse == len(each)
    for n, layer_aux in enumerate(each):
        aux_of_layer = jax.tree.map(lambda stacked, n=n: stacked[n], aux)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), aux_of_layer, layer_aux
        )


def test_what_remat_recomputes_changes_no_gradient():
    tokens = tokens_of(2, 7)

    @jax.jit
    def gradients(module):
        return jax.grad(
            lambda module: (module(module.embed(tokens), *plain(tokens))[0] ** 3).mean()
        )(module)

    expected = jax.tree.leaves(gradients(decoder(SPARSE)))
    for remat in ("dots", "full"):
        for a, b in zip(
            jax.tree.leaves(gradients(decoder(SPARSE, remat=remat))), expected, strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("platform", "same"), [("cpu", "dots"), ("tpu", "full"), ("gpu", "full")])
def test_what_is_recomputed_goes_by_the_platform(platform, same, monkeypatch):
    monkeypatch.setattr("mod_jax.models.remat.platform", lambda: platform)

    def program(remat):
        layer = rematerialised(remat, lambda x, w: jnp.sin(x @ w))
        return str(jax.make_jaxpr(jax.grad(lambda w: layer(w, w).sum()))(jnp.ones((2, 2))))

    assert program("auto") == program(same) != program("none")


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_packed_chats_equal_the_chats_alone(config):
    first, second = tokens_of(1, 4, 1), tokens_of(1, 6, 2)
    packed = jnp.concatenate([first, second, tokens_of(1, 2, 3)], axis=1)
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 0]])
    segment_ids = jnp.array([[1] * 4 + [2] * 6 + [0] * 2])
    hidden, _ = run(decoder(config), packed, positions, segment_ids, jnp.zeros_like(packed))
    np.testing.assert_allclose(hidden[:, :4], hidden_of(decoder(config), first), **CLOSE)
    np.testing.assert_allclose(hidden[:, 4:10], hidden_of(decoder(config), second), **CLOSE)


def test_two_branches_of_a_prefix_equal_two_sequences():
    prefix, chosen, rejected = tokens_of(1, 4, 1), tokens_of(1, 3, 2), tokens_of(1, 2, 3)
    pair = jnp.concatenate([prefix, chosen, rejected], axis=1)
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 4, 5]])
    branch_ids = jnp.array([[0] * 4 + [1] * 3 + [2] * 2])
    hidden, _ = run(decoder(SPARSE), pair, positions, jnp.ones_like(pair), branch_ids)
    whole_chosen = hidden_of(decoder(SPARSE), jnp.concatenate([prefix, chosen], axis=1))
    whole_rejected = hidden_of(decoder(SPARSE), jnp.concatenate([prefix, rejected], axis=1))
    np.testing.assert_allclose(hidden[:, :7], whole_chosen, **CLOSE)
    np.testing.assert_allclose(hidden[:, 7:], whole_rejected[:, 4:], **CLOSE)


def test_padding_changes_nothing_and_is_finite():
    """Neither the contents of padding nor a row of padding alone changes values or gradients."""
    real = jnp.array([[True] * 5 + [False] * 3, [False] * 8])
    positions, segment_ids = jnp.where(real, jnp.arange(8), 0), real.astype(jnp.int32)
    tokens = jnp.where(real, tokens_of(2, 8), 0)

    @jax.jit
    def loss_and_gradients(module, tokens):
        def loss(module):
            hidden, aux = module(
                module.embed(tokens), positions, segment_ids, jnp.zeros_like(tokens)
            )
            return jnp.where(real[..., None], hidden**3, 0).sum() + aux.balance.sum(), aux

        return jax.value_and_grad(loss, has_aux=True)(module)

    other = jnp.where(real, tokens, tokens_of(2, 8, 9))
    found = loss_and_gradients(decoder(SPARSE), tokens)
    changed = loss_and_gradients(decoder(SPARSE), other)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(changed), strict=True):
        assert bool(jnp.isfinite(a).all())
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    hidden, _ = run(decoder(SPARSE), tokens, positions, segment_ids, jnp.zeros_like(tokens))
    np.testing.assert_allclose(hidden[:1, :5], hidden_of(decoder(SPARSE), tokens[:1, :5]), **CLOSE)


@pytest.mark.parametrize(
    "moe", [None, MoEConfig(), MoEConfig(layers=(1, 2))], ids=["dense", "sparse", "explicit"]
)
def test_cached_decoding_equals_the_whole_sequence(moe):
    """Prompts of 5 and 3 tokens, the shorter one padded on the left; then one token, and two."""
    module = decoder(dataclasses.replace(DENSE, moe=moe))
    tokens = tokens_of(2, 8)
    starts = jnp.array([[0], [2]])
    positions = jnp.maximum(jnp.arange(8)[None] - starts, 0)
    segment_ids = (jnp.arange(8)[None] >= starts).astype(jnp.int32)

    def step(module, cache, tokens, positions, segment_ids):
        hidden, _, cache = module(
            module.embed(tokens), positions, segment_ids, jnp.zeros_like(tokens), cache=cache
        )
        return hidden, cache

    begin, go_on = jax.jit(step, static_argnums=1), jax.jit(step)
    cache, found = 10, []
    for run, piece in ((begin, slice(0, 5)), (go_on, slice(5, 6)), (go_on, slice(6, 8))):
        hidden, cache = run(
            module, cache, tokens[:, piece], positions[:, piece], segment_ids[:, piece]
        )
        found.append(hidden)
    found = jnp.concatenate(found, axis=1)
    assert int(cache.index) == 8
    np.testing.assert_allclose(found[0], hidden_of(module, tokens[:1])[0], **CLOSE)
    np.testing.assert_allclose(found[1, 2:], hidden_of(module, tokens[1:, 2:])[0], **CLOSE)


def test_rotary_positions_turn_pairs_as_complex_numbers():
    """In float64: x[i] + 1j x[i + H/2] times exp(1j position theta^(-2i/H))."""
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 100, 2047, 3]])
    pairs = x[..., :4] + 1j * x[..., 4:]
    turned = pairs * np.exp(1j * positions[:, :, None, None] * 1e4 ** (-np.arange(0, 8, 2) / 8))
    found = rotate(jnp.float32(x), rotary_angles(jnp.asarray(positions), 8, 1e4))
    np.testing.assert_allclose(
        found, np.concatenate([turned.real, turned.imag], axis=-1), atol=5e-4
    )


def test_rms_norm_takes_its_statistics_in_float32():
    """A bfloat16 sum of 4096 squares would be off by far more than the rounding of the result.

    The tolerance is that rounding alone: float32 statistics add less than it leaves.
    """
    x = jax.random.normal(jax.random.key(0), (3, 4096)).astype(jnp.bfloat16) * 30
    norm = RMSNorm((), 4096, 1e-6)
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(norm(x), np.float64), expected, rtol=2**-8)


@pytest.mark.parametrize(
    "changes", [{"qkv_bias": False}, {"qkv_bias": False, "qk_norm": True}], ids=["llama", "qwen3"]
)
def test_families_differ_in_their_parameters_only(changes):
    config = dataclasses.replace(DENSE, **changes)
    names = {
        ".".join(path) for path, _ in nnx.to_flat_state(nnx.state(decoder(config).layers.attention))
    }
    assert ("query.b_nh" in names) == config.qkv_bias
    assert ("query_norm.scale_h" in names) == config.qk_norm
    hidden = hidden_of(decoder(config), tokens_of(2, 7))
    assert hidden.shape == (2, 7, 32) and bool(jnp.isfinite(hidden).all())


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_bfloat16_stays_near_float32(config):
    tokens = tokens_of(2, 7)
    low, high = hidden_of(decoder(config, "bfloat16"), tokens), hidden_of(decoder(config), tokens)
    assert low.dtype == jnp.bfloat16
    assert float(jnp.abs(low.astype(jnp.float32) - high).mean()) < 0.05 * float(
        jnp.abs(high).mean()
    )
