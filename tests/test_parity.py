"""Our models compute what transformers computes, in float32.

Compared are features, logits and the gradient of every parameter. The oracles are small random
models: transformers saves them and we load them; what we save, transformers loads again.

Every bound but one is relative to the largest value of the tensor compared. The exception is the
bias of a key without rotary positions, whose exact gradient is 0: see `KeyBiasRounding`.
"""

import copy
import functools
import json

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention

from mod_jax.batch import Batch
from mod_jax.config import DecoderConfig, ModelConfig, VisionConfig
from mod_jax.interop import huggingface, names
from mod_jax.models import llava

TINY_TOWER = VisionConfig(
    image_size=4, patch_size=4, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2
)
TINY_DECODER = DecoderConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
)
PATCHES = 9  # of a picture of `hf_models`
FEATURES_RTOL, LOGITS_RTOL, GRADIENT_RTOL = 1e-5, 1e-5, 1e-4
KEY_BIAS = "vision_tower.layers.attention.key.b_nh"  # its gradient is 0 but for rounding
UNIT_ROUNDOFF = 2.0**-24  # of float32: the largest relative error of one rounding


class KeyBiasRounding:
    """How far from 0 rounding can take the gradients of the keys' biases in a vision tower.

    A key's bias adds the same number to all scores of a query. Softmax does not see that, so the
    exact gradient is 0, and what is computed is nothing but rounding: comparing two such numbers
    with each other, or with their own size, would test the machine's order of summation. They are
    compared with the terms they are sums of instead.

    Axes: M pictures, N heads, S queries, T keys, H head size. With the softmax weights
    p[m,n,s,t], their gradients g[m,n,s,t] and the queries q[m,n,s,h], every implementation of the
    backward pass computes

        d bias[n,h] = sum_mts scale q[m,n,s,h] p[m,n,s,t] (g[m,n,s,t] - c[m,n,s])
        c[m,n,s]    = sum_t p[m,n,s,t] g[m,n,s,t].

    It is 0 for whatever q and g the earlier steps arrived at, because sum_t p = 1; their errors do
    not matter. A term of it goes through

      * T roundings in p: the sum over T that normalises it, and the quotient,
      * T in c: a product, and the sum over T,
      * 3 in the difference and the two products that make the gradient of a score,
      * S in the gradient of a key: a product, and the sum over S,
      * M T - 1 in the sum over the positions of all keys,

    in any order of summation at most. To first order each changes the sum by no more than
    UNIT_ROUNDOFF times the sum of the terms' absolute values,

        sum_ms scale |q[m,n,s,h]| sum_t p[m,n,s,t] (|g[m,n,s,t]| + |c[m,n,s]|).

    For two pictures of ten positions these are 52 roundings. As their errors have both signs, what
    is measured is the effect of a single one at most.

    Args:
      model: the oracle, with eager attention; watched during the next forward and backward pass.
    """

    def __init__(self, model: torch.nn.Module):
        self.seen = {}  # name of an attention -> (module, weights [M,N,S,T], queries [M,S,N*H])
        for name, module in model.named_modules():
            if isinstance(module, (CLIPAttention, SiglipAttention)):
                module.register_forward_hook(functools.partial(self._watch, name), with_kwargs=True)

    def _watch(self, name, module, args, kwargs, outputs):
        hidden = args[0] if args else kwargs["hidden_states"]
        _, weights = outputs
        weights.retain_grad()
        self.seen[name] = module, weights, module.q_proj(hidden).detach()

    def bounds(self) -> dict[str, np.ndarray]:
        """Oracle's name of each key bias -> bound of its gradient's absolute value, [N*H].

        Layers that no gradient reached are left out: theirs is 0 without any rounding.
        """
        found = {}
        for name, (module, weights, queries) in self.seen.items():
            if weights.grad is None:
                continue
            pictures, heads, length, keys = weights.shape
            queries = queries.view(pictures, length, heads, -1).transpose(1, 2)
            p, g = weights.detach(), weights.grad
            c = (p * g).sum(-1, keepdim=True)
            softmax_terms = (p * (g.abs() + c.abs())).sum(-1, keepdim=True)
            terms = (module.scale * queries.abs() * softmax_terms).sum((0, 2)).flatten()
            roundings = 2 * keys + length + pictures * keys + 2
            found[f"{name}.k_proj.bias"] = roundings * UNIT_ROUNDOFF * terms.numpy()
        return found


def assert_near(found, wanted, rtol, name=""):
    """max |difference| <= rtol * max |wanted|."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape, name
    difference, scale = np.abs(found - wanted).max(), np.abs(wanted).max()
    assert difference <= rtol * scale, f"{name}: differs by {difference:.2e}, of {scale:.2e}"


def under_our_names(arrays: dict, entries: list, kind: str) -> dict[str, np.ndarray]:
    """Arrays of the oracle's parameters, stacked and laid out as ours are."""
    stacks = names.to_ours(entries, names.canonical(arrays, kind))
    return {name: np.asarray(stack) for name, stack in stacks.items()}


def assert_same_gradients(found: dict, theirs: dict, zero: dict, entries: list, kind: str):
    """Every parameter has the gradient that it has in the oracle.

    Args:
      found: our names -> gradients.
      theirs: the oracle's names -> gradients.
      zero: the oracle's names of the gradients that are 0 in exact arithmetic -> bounds of their
        absolute values, which hold for both sides.
      entries: the table of names.
      kind: of the oracle, a key of `names.SPELLINGS`.
    """
    bounds = {name: np.zeros_like(gradient) for name, gradient in theirs.items()} | zero
    wanted = under_our_names(theirs, entries, kind)
    bounds = under_our_names(bounds, entries, kind)
    assert len(wanted) > 10
    for name, gradient in wanted.items():
        assert np.shape(found[name]) == gradient.shape, name
        if np.any(bounds[name]):
            for side in (found[name], gradient):
                excess = np.abs(side) - bounds[name]
                assert excess.max() <= 0, f"{name}: {excess.max():.2e} more than rounding"
        else:
            assert_near(found[name], gradient, GRADIENT_RTOL, name)


def whole(config: ModelConfig, part: dict) -> dict:
    """The parameters `part`, and zeros for all other parameters of the model."""
    return {name: np.zeros(x.shape, x.dtype) for name, x in llava.abstract(config).items()} | part


def pictures(count: int, size: int = 12, seed: int = 0) -> np.ndarray:
    """Random pictures u8[count,H,W,3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def random_tokens(rows: int, length: int) -> np.ndarray:
    """Random i32[rows,length], without the padding token: torch gives its embedding no gradient."""
    return np.random.default_rng(length).integers(0, hf_models.END_TOKEN, (rows, length), np.int32)


def pixel_values(images: np.ndarray, config: VisionConfig) -> torch.Tensor:
    """Normalised pictures f32[count,3,H,W], as transformers' towers take them."""
    normalised = (images / 255.0 - np.array(config.pixel_mean)) / np.array(config.pixel_std)
    return torch.tensor(normalised.transpose(0, 3, 1, 2), dtype=torch.float32)


def chat(tokens: np.ndarray, images: np.ndarray) -> Batch:
    """A batch of unpacked rows, whose picture tokens take the features in order.

    Args:
      tokens: i32[B,S].
      images: u8[B,N,H,W,3].
    """
    rows, length = tokens.shape
    is_picture = tokens == hf_models.IMAGE_TOKEN
    index = np.where(is_picture, np.cumsum(is_picture, axis=1) - 1, -1)
    zeros = np.zeros_like(tokens)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return Batch(
        tokens=tokens,
        targets=zeros,
        loss_weights=zeros.astype(np.float32),
        positions=positions,
        segment_ids=zeros + 1,
        branch_ids=zeros,
        picture_index=index.astype(np.int32),
        images=images,
        samples=np.zeros((rows, 1), np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradients(config: ModelConfig, params: dict, batch: Batch):
    """Logits f32[B,S,V] and the gradient of the mean next-token loss over all positions."""

    def loss(params):
        hidden, _ = llava.bind(config, params)(batch)
        logits = hidden @ llava.head(config, params).T
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), batch.tokens[:, 1:, None], axis=-1
        )
        return -picked.mean(), logits

    (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, gradients


def torch_logits(model: torch.nn.Module, tokens: np.ndarray, **inputs) -> torch.Tensor:
    """Logits f32[B,S,V]; leaves the gradients of the mean next-token loss in the model."""
    ids = torch.tensor(tokens, dtype=torch.long)
    model.zero_grad()
    logits = model(input_ids=ids, **inputs).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach()


def reloaded(folder) -> torch.nn.Module:
    """The model that stock transformers loads from our folder, and finds complete.

    The one thing absent from the file is a shared expert of size 0: it has no numbers, and vLLM
    refuses its tensors. The model is a copy: tensors mapped from a file are not aligned as those of
    `hf_models.build`, and alignment may change the order in which a kernel sums.
    """
    (named,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, report = getattr(transformers, named).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    empty = {name for name, parameter in model.named_parameters() if parameter.numel() == 0}
    assert not report["missing_keys"] - empty, report
    assert not report["unexpected_keys"] and not report["mismatched_keys"], report
    return copy.deepcopy(model).eval()


TOWERS = {
    "clip": hf_models.clip(),
    "clip, exact gelu, another layer": hf_models.clip(hidden_act="gelu"),
    "siglip": hf_models.siglip(),
}


@pytest.mark.parametrize(
    "kind, layer",
    [("clip", -2), ("clip, exact gelu, another layer", -3), ("siglip", -2), ("siglip", -1)],
)
def test_vision_tower(kind, layer, tmp_path):
    model = hf_models.build(TOWERS[kind])
    rounding = KeyBiasRounding(model)
    model.save_pretrained(tmp_path / "theirs")
    vision, tower = hf_models.load(tmp_path / "theirs")
    images = pictures(2)
    first_patch = int(vision.family == "clip")  # after the class embedding

    def theirs(model):
        outputs = model(pixel_values(images, vision), output_hidden_states=True)
        return outputs.hidden_states[layer][:, first_patch:]

    wanted = theirs(model)
    cotangent = np.random.default_rng(1).normal(size=wanted.shape).astype(np.float32)
    (wanted * torch.tensor(cotangent)).sum().backward()

    config = ModelConfig(
        vision=VisionConfig(**vars(vision) | {"feature_layer": layer}), decoder=TINY_DECODER
    )

    def functional(params):
        features = llava.bind(config, params).features(images[None])[0].reshape(wanted.shape)
        return (features * cotangent).sum(), features

    ours = jax.jit(jax.value_and_grad(functional, has_aux=True))
    with jax.default_matmul_precision("highest"):
        (_, features), gradients = ours(whole(config, tower))
    assert_near(features, wanted.detach(), FEATURES_RTOL)
    assert_same_gradients(
        gradients,
        hf_models.gradients(model),
        rounding.bounds(),
        names.vision_entries(vision),
        "vision_tower",
    )

    huggingface.save(tmp_path / "ours", vision, tower)
    again = theirs(reloaded(tmp_path / "ours")).detach()
    assert torch.equal(again, wanted.detach())


def test_a_gradient_that_is_wrong_by_a_thousandth_is_noticed(tmp_path):
    """By 1e-3 of its largest value; of a key's bias, by 1e-3 of the query's biases'."""
    model = hf_models.build(TOWERS["siglip"])
    model.save_pretrained(tmp_path)
    vision, _ = hf_models.load(tmp_path)
    rounding = KeyBiasRounding(model)
    features = model(pixel_values(pictures(2), vision), output_hidden_states=True).hidden_states[-1]
    (features**2).sum().backward()
    theirs, zero = hf_models.gradients(model), rounding.bounds()
    entries = names.vision_entries(vision)
    right = under_our_names(theirs, entries, "vision_tower")
    assert_same_gradients(right, theirs, zero, entries, "vision_tower")
    for name, gradient in right.items():
        scale = np.abs(right[name.replace("attention.key.b_nh", "attention.query.b_nh")]).max()
        wrong = right | {name: gradient + 1e-3 * (scale or 1.0)}
        with pytest.raises(AssertionError, match=name):
            assert_same_gradients(wrong, theirs, zero, entries, "vision_tower")


LANGUAGE_MODELS = {
    "qwen2, tied": hf_models.qwen2(),
    "qwen2, untied": hf_models.qwen2(tie_word_embeddings=False, num_key_value_heads=4),
    "llama": hf_models.llama(),
    "mistral, within its window": hf_models.mistral(sliding_window=14),
    "qwen3": hf_models.qwen3(),
    "qwen2_moe, second half": hf_models.qwen2_moe(mlp_only_layers=[0, 1]),
    "qwen2_moe, one expert by its probability": hf_models.qwen2_moe(
        norm_topk_prob=False, num_experts_per_tok=1
    ),
    "qwen3_moe": hf_models.qwen3_moe(),
    "qwen3_moe, by probabilities": hf_models.qwen3_moe(norm_topk_prob=False),
}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_language_model(kind, tmp_path):
    model = hf_models.build(LANGUAGE_MODELS[kind])
    model.save_pretrained(tmp_path / "theirs")
    decoder, part = hf_models.load(tmp_path / "theirs")
    tokens = random_tokens(2, 14)
    wanted = torch_logits(model, tokens)

    config = ModelConfig(vision=TINY_TOWER, decoder=decoder)
    batch = chat(tokens, np.zeros((2, 0, 4, 4, 3), np.uint8))
    with jax.default_matmul_precision("highest"):
        logits, gradients = logits_and_gradients(config, whole(config, part), batch)
    assert_near(logits, wanted, LOGITS_RTOL)
    theirs = hf_models.gradients(model)
    entries = names.decoder_entries(decoder)
    assert_same_gradients(gradients, theirs, {}, entries, "language_model")

    huggingface.save(tmp_path / "ours", decoder, part)
    assert torch.equal(torch_logits(reloaded(tmp_path / "ours"), tokens), wanted)


LLAVAS = {
    "clip + qwen2": hf_models.llava(hf_models.clip(), hf_models.qwen2()),
    "clip + qwen2_moe": hf_models.llava(hf_models.clip(), hf_models.qwen2_moe()),
    "siglip + llama": hf_models.llava(hf_models.siglip(), hf_models.llama()),
}
CONTENTS = {
    "a picture in the middle": [4, "picture", 7],
    "two pictures": ["picture", 3, "picture", 5],
    "text only": [14],
}


def conversation(content: list) -> tuple[np.ndarray, np.ndarray]:
    """(tokens i32[1,S], pictures u8[1,N,H,W,3]), given lengths of text and "picture"s."""
    parts = [
        np.full((1, PATCHES), hf_models.IMAGE_TOKEN)
        if part == "picture"
        else random_tokens(1, part)
        for part in content
    ]
    return np.concatenate(parts, axis=1).astype(np.int32), pictures(content.count("picture"))[None]


@pytest.mark.parametrize(
    "kind, content",
    [("clip + qwen2", name) for name in CONTENTS]
    + [(kind, "two pictures") for kind in list(LLAVAS)[1:]],
)
def test_llava(kind, content, tmp_path):
    model = hf_models.build(LLAVAS[kind])
    rounding = KeyBiasRounding(model)
    model.save_pretrained(tmp_path / "theirs")
    config, params = hf_models.load(tmp_path / "theirs")
    tokens, images = conversation(CONTENTS[content])
    inputs = {"pixel_values": pixel_values(images[0], config.vision)} if images.size else {}
    wanted = torch_logits(model, tokens, **inputs)

    with jax.default_matmul_precision("highest"):
        logits, gradients = logits_and_gradients(config, params, chat(tokens, images))
    assert_near(logits, wanted, LOGITS_RTOL)
    theirs, zero = hf_models.gradients(model), rounding.bounds()
    assert_same_gradients(gradients, theirs, zero, names.llava_entries(config), "llava")
    idle = ("vision_tower.", "adaptor.") if content == "text only" else ("vision_tower.post_norm.",)
    for name, gradient in gradients.items():
        if name != KEY_BIAS or content == "text only":  # rounding may leave it 0 or not
            assert np.asarray(gradient).any() != name.startswith(idle), name

    huggingface.save(tmp_path / "ours", config, params)
    assert torch.equal(torch_logits(reloaded(tmp_path / "ours"), tokens, **inputs), wanted)


def test_a_sparse_llama_is_exported_with_biases_of_zero(tmp_path):
    """transformers has no sparse Llama; Qwen2-MoE without its biases is one."""
    model = hf_models.build(hf_models.qwen2_moe(qkv_bias=False))
    model.save_pretrained(tmp_path / "theirs")
    decoder, part = hf_models.load(tmp_path / "theirs")
    assert not decoder.qkv_bias
    tokens = random_tokens(2, 14)
    huggingface.save(tmp_path / "ours", decoder, part)
    again = reloaded(tmp_path / "ours")
    assert again.config.qkv_bias
    assert torch.equal(torch_logits(again, tokens), torch_logits(model, tokens))
