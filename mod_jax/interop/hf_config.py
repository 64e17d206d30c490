"""Hugging Face's config.json and our configurations, in both directions.

A config.json leaves out what equals the default of its class, so the defaults of transformers'
classes are listed here. An option that our models do not compute (another activation, scaled rotary
angles, ...) is never ignored: a single ConfigError names all such options.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mod_jax.config import (
    ConfigError,
    DecoderConfig,
    ModelConfig,
    MoEConfig,
    VisionConfig,
    from_dict,
    require,
)
from mod_jax.interop.folder import JsonObject
from mod_jax.interop.image_processor import image_processor_to_json
from mod_jax.interop.stated import end_tokens, first_stated

_LLAMA: JsonObject = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_QWEN = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_QWEN_MOE = _QWEN | {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# Defaults of the text classes.
TEXT_DEFAULTS: dict[str, JsonObject] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "qwen2_moe": _QWEN_MOE
    | {
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    "qwen3_moe": _QWEN_MOE
    | {
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
# Default of sliding_window in all text classes, where attention slides at all.
WINDOW = 4096
# Default of eos_token_id; Qwen's classes have none.
END_TOKENS = {"llama": 2, "mistral": 2}

_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
# Defaults of the vision classes.
VISION_DEFAULTS: dict[str, JsonObject] = {
    "clip_vision_model": {
        **_TOWER,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        **_TOWER,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}

# model_type of a vision tower -> VisionConfig.family.
TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
# Number of tokens before the patches, which are dropped from the features, by VisionConfig.family.
# CLIP has a class token; the first token of SigLIP is a patch.
CLASS_TOKENS = {"clip": 1, "siglip": 0}
# hidden_act of a vision tower -> VisionConfig.hidden_act.
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
SIGLIP_MEAN_STD: JsonObject = {"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.5, 0.5, 0.5)}
# (qkv_bias, qk_norm) of a decoder -> model_type.
DENSE_FAMILIES = {
    (True, False): "qwen2",
    (False, False): "llama",
    (False, True): "qwen3",
}
SPARSE_FAMILIES = {(True, False): "qwen2_moe", (False, True): "qwen3_moe"}
# model_type -> class of transformers.
CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "llava": "LlavaForConditionalGeneration",
}

# Keys whose values are positive integers.
TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
MOE_SIZES = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
)
VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
# Those that may also be None.
NULLABLE = ("num_key_value_heads", "head_dim")
# Keys whose None says something: a size is then wrong, and attention does not slide. Elsewhere None
# is what a file has that leaves the key out.
MEANINGFUL_NULLS = {*TEXT_SIZES, *MOE_SIZES, *VISION_SIZES, "sliding_window"}
# What transformers takes for a llava whose config.json has no part for its tower.
LLAVA_TOWER: JsonObject = {
    "model_type": "clip_vision_model",
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
# Defaults of the llava class.
LLAVA_DEFAULTS: JsonObject = {
    "text_config": {},
    "vision_config": LLAVA_TOWER,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
IMAGE_TOKEN = 32000


def feature_strategy(family: str) -> str:
    """`vision_feature_select_strategy` of the features that a tower gives here: all patches.

    "default" drops the first token of a tower, "full" keeps all.
    """
    return "default" if CLASS_TOKENS[family] else "full"


def check(*checks: Callable[[], Any]) -> list[Any]:
    """Runs all checks and returns their results.

    Raises:
      ConfigError: With the messages of all checks that raise one.
    """
    results: list[Any] = []
    errors: list[str] = []
    for run_check in checks:
        try:
            results.append(run_check())
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError(" ".join(errors))
    return results


def require_fixed(values: Mapping, fixed: Mapping, why: str) -> None:
    """Raises ConfigError naming every key of `fixed` that `values` has with another value."""
    wrong = {key: values[key] for key, only in fixed.items() if values.get(key, only) != only}
    expected = {key: fixed[key] for key in wrong}
    require(not wrong, "config.json", wrong, f"{expected}, {why}")


def _without_nulls(values: JsonObject) -> JsonObject:
    return {k: v for k, v in values.items() if v is not None or k in MEANINGFUL_NULLS}


def _require_sizes(values: Mapping, keys: tuple[str, ...]) -> None:
    wrong = {}
    for key in keys:
        if key not in values or (key in NULLABLE and values[key] is None):
            continue
        size = values[key]
        if type(size) is not int or size < 1:  # isinstance would accept True
            wrong[key] = size
    require(not wrong, "config.json", wrong, "positive integers")


def decoder_from_json(values: JsonObject) -> DecoderConfig:
    """Reads a text configuration.

    Args:
      values: Contents of the config.json of a language model.

    Raises:
      ConfigError: For a family or an option that the decoder does not compute.
    """
    require(
        values.get("model_type") in TEXT_DEFAULTS,
        "model_type",
        values.get("model_type"),
        f"a language model of {sorted(TEXT_DEFAULTS)}",
    )
    family = values["model_type"]
    values = _without_nulls(values)
    c = TEXT_DEFAULTS[family] | values
    sparse = family in SPARSE_FAMILIES.values()
    if sparse:  # num_local_experts is the name in qwen3_moe of 5.x, num_experts everywhere else
        names = ("num_local_experts", "num_experts")
        experts = first_stated("the number of experts", {name: values.get(name) for name in names})
        c["num_experts"] = c["num_experts"] if experts is None else experts
    sizes: tuple[str, ...] = TEXT_SIZES
    fixed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
    }
    if sparse:
        sizes += MOE_SIZES
        fixed |= {"shared_expert_intermediate_size": 0}
    rope_theta, *_ = check(
        lambda: _rope_theta(c),
        lambda: _require_sizes(c, sizes),
        lambda: require_fixed(c, fixed, "the only values that the decoder computes"),
    )
    moe = _moe_from_json(c) if sparse else None
    fields = {
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "intermediate_size": _intermediate_size(c, moe),
        "num_layers": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "num_kv_heads": c["num_key_value_heads"] or c["num_attention_heads"],
        "head_dim": c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        "rope_theta": rope_theta,
        "norm_eps": c["rms_norm_eps"],
        "qkv_bias": c.get("qkv_bias", family == "qwen2"),
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "tie_embeddings": c.get("tie_word_embeddings", False),
        "max_positions": _max_positions(c),
        "moe": moe,
    }
    return from_dict(DecoderConfig, fields, "text configuration")


def _rope_theta(c: JsonObject) -> Any:
    """The rotary base, not checked yet; raises ConfigError for scaled rotary angles."""
    kinds: JsonObject = {}
    bases: JsonObject = {}
    # rope_parameters is the name of transformers 5.x, rope_scaling that of 4.x.
    for name in ("rope_scaling", "rope_parameters"):
        rope = c.get(name) or {}
        flat = isinstance(rope, Mapping) and not any(isinstance(v, Mapping) for v in rope.values())
        require(flat, name, rope, "one object for all layers")
        if rope:
            kinds[name] = rope.get("rope_type") or rope.get("type") or "default"
        bases[f"{name}.rope_theta"] = rope.get("rope_theta")
    kind = first_stated("rope_type", kinds) or "default"
    expected = "'default', the only one that the decoder computes"
    require(kind == "default", "rope_type", kind, expected)
    base = first_stated("rope_theta", bases | {"rope_theta": c.get("rope_theta")})
    return 10000.0 if base is None else base


def _max_positions(c: JsonObject) -> int:
    """Longest supported sequence, capped at the sliding window, which is not implemented.

    On a sequence that is no longer than the window, sliding and full attention are the same.
    """
    longest = c["max_position_embeddings"]
    slides = c["model_type"] == "mistral" or c.get("use_sliding_window")
    window = c.get("sliding_window", WINDOW) if slides else None
    return min(longest, window or longest)


def _moe_from_json(c: JsonObject) -> MoEConfig:
    step = c["decoder_sparse_step"]
    dense = c["mlp_only_layers"] or ()
    layers = tuple(
        number
        for number in range(c["num_hidden_layers"])
        if number not in dense and (number + 1) % step == 0
    )
    return MoEConfig(
        layers=layers,
        num_experts=c["num_experts"],
        experts_per_token=c["num_experts_per_tok"],
        norm_topk_prob=c["norm_topk_prob"],
    )


def _intermediate_size(c: JsonObject, moe: MoEConfig | None) -> int:
    """The size of both dense layers and experts, which our decoder requires to be the same.

    If all layers are sparse, the size of the dense layers has no meaning and is ignored.
    """
    if moe is None:
        return c["intermediate_size"]
    if len(moe.layers) == c["num_hidden_layers"]:
        return c["moe_intermediate_size"]
    require_fixed(
        c,
        {"moe_intermediate_size": c["intermediate_size"]},
        "the size of the dense layers, as each expert is a copy of one",
    )
    return c["intermediate_size"]


def decoder_to_json(
    config: DecoderConfig,
    dtype: str,
    end_token_ids: Sequence[int] = (),
    pad_token_id: int | None = None,
) -> JsonObject:
    """Text configuration that stock transformers (4.46 to 5.x) and vLLM compute as our decoder.

    Args:
      config: The decoder.
      dtype: Dtype of the weights.
      end_token_ids: Ids of the tokens that end an answer; empty leaves them out.
      pad_token_id: Id of the token that pads; None leaves it out.

    Raises:
      ConfigError: If no family of transformers computes exactly the same.
    """
    options = (config.qkv_bias, config.qk_norm)
    families = SPARSE_FAMILIES if config.moe else DENSE_FAMILIES
    require(
        options in families,
        "(decoder.qkv_bias, decoder.qk_norm)",
        options,
        f"one of {list(families)}; transformers has no family with any other combination",
    )
    family = families[options]
    values = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # read by 4.x
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # by 5.x
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if end_token_ids:
        values["eos_token_id"] = one_or_all(end_token_ids)
    if pad_token_id is not None:
        values["pad_token_id"] = pad_token_id
    if config.moe:
        values |= _moe_to_json(config, config.moe)
    return values


def one_or_all(token_ids: Sequence[int]) -> int | list[int]:
    """Token ids as config.json has them: a number if there is one, else a list."""
    return token_ids[0] if len(token_ids) == 1 else list(token_ids)


def _moe_to_json(config: DecoderConfig, moe: MoEConfig) -> JsonObject:
    require(
        not moe.residual,
        "moe.residual",
        moe.residual,
        "False: transformers has no shared expert that is mixed in by a softmax over two weights",
    )
    require(
        moe.dropless,
        "moe.capacity_factor",
        moe.capacity_factor,
        "None, or a factor that drops no token: transformers has no expert capacity",
        "A dropless export (moe.capacity_factor None) computes different outputs wherever tokens "
        "were dropped.",
    )
    values: JsonObject
    if config.qkv_bias:
        values = {"shared_expert_intermediate_size": 0, "qkv_bias": True}
    else:
        values = {"num_local_experts": moe.num_experts}
    dense = [n for n in range(config.num_layers) if n not in config.sparse_layers]
    return values | {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "moe_intermediate_size": config.intermediate_size,
    }


def vision_from_json(
    values: JsonObject, processor: JsonObject, feature_layer: int = -2
) -> VisionConfig:
    """Reads a vision configuration.

    Args:
      values: Contents of the config.json of a tower, or of its part for the tower.
      processor: The image processor, which has the pixel statistics; if it is empty, they are those
        of the tower's family.
      feature_layer: Hidden state that is used as the feature, as in VisionConfig.

    Raises:
      ConfigError: For a family or an option that the tower does not compute.
    """
    require(
        values.get("model_type") in TOWERS,
        "model_type",
        values.get("model_type"),
        f"a vision tower of {sorted(TOWERS)}",
    )
    kind = values["model_type"]
    c = VISION_DEFAULTS[kind] | _without_nulls(values)
    check(
        lambda: _require_sizes(c, VISION_SIZES),
        lambda: require_fixed(c, {"quantization_config": None}, "unquantised weights"),
        lambda: require(
            c["hidden_act"] in ACTIVATIONS,
            "vision_config.hidden_act",
            c["hidden_act"],
            f"one of {sorted(ACTIVATIONS)}",
        ),
        lambda: require(
            isinstance(feature_layer, int),
            "vision_feature_layer",
            feature_layer,
            "the number of one layer",
        ),
    )
    pixels: JsonObject = dict(SIGLIP_MEAN_STD) if kind == "siglip_vision_model" else {}
    for key, name in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        if processor.get(name) is not None:
            pixels[key] = processor[name]
    fields = {
        "family": TOWERS[kind],
        "image_size": c["image_size"],
        "patch_size": c["patch_size"],
        "hidden_size": c["hidden_size"],
        "intermediate_size": c["intermediate_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "hidden_act": ACTIVATIONS[c["hidden_act"]],
        "norm_eps": c["layer_norm_eps"],
        "feature_layer": counted_from_the_end(feature_layer, c["num_hidden_layers"]),
        **pixels,
    }
    return from_dict(VisionConfig, fields, "vision configuration")


def counted_from_the_end(layer: int, num_layers: int) -> int:
    """Number of a hidden state as VisionConfig has it; transformers also counts from the first."""
    return layer - (num_layers + 1) if layer >= 0 else layer


def vision_to_json(config: VisionConfig) -> JsonObject:
    """Vision configuration that transformers computes as our tower."""
    kind = _key_of(TOWERS, config.family)
    values = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": _key_of(ACTIVATIONS, config.hidden_act),
        "layer_norm_eps": config.norm_eps,
    }
    if config.family == "clip":
        return values | {"projection_dim": config.hidden_size}
    return values | {"vision_use_head": False}


def _key_of(table: Mapping[str, str], value: str) -> str:
    return next(key for key, candidate in table.items() if candidate == value)


def model_from_json(
    values: JsonObject, processor: JsonObject, generation: JsonObject
) -> ModelConfig:
    """Reads a llava configuration.

    Args:
      values: Contents of config.json.
      processor: The image processor; empty if there is none.
      generation: Contents of generation_config.json; empty if there is none.

    Raises:
      ConfigError: Naming every option that the model does not compute, every fact that is stated
        twice with different values, or every token without a row in the embedding.
    """
    c = LLAVA_DEFAULTS | _without_nulls(values)
    parts = (c["text_config"], c["vision_config"])
    are_objects = all(isinstance(part, dict) for part in parts)
    require(are_objects, "text_config, vision_config", parts, "a JSON object each")
    text = {"model_type": "llama"} | c["text_config"]
    # The head is the embedding if either place says so.
    text["tie_word_embeddings"] = text.get("tie_word_embeddings") or c["tie_word_embeddings"]
    tower = {"model_type": "clip_vision_model"} | c["vision_config"]
    family = TOWERS.get(tower["model_type"], "clip")
    fixed = {
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "quantization_config": None,
        "vision_feature_select_strategy": feature_strategy(family),
    }
    why = f"the only values that the model computes with a {family} tower"
    image_tokens = {key: values.get(key) for key in ("image_token_index", "image_token_id")}
    vision, decoder, _, image_token, ends = check(
        lambda: vision_from_json(tower, processor, c["vision_feature_layer"]),
        lambda: decoder_from_json(text),
        lambda: require_fixed(c, fixed, why),
        lambda: first_stated("the id of <image>", image_tokens),
        lambda: end_tokens_of(values, text, generation),
    )
    # Qwen's classes have no default.
    end, *others = ends or (ModelConfig.end_token_id,)
    config = ModelConfig(
        vision=vision,
        decoder=decoder,
        image_token_id=IMAGE_TOKEN if image_token is None else image_token,
        end_token_id=end,
        other_end_token_ids=tuple(others),
    )
    require_rows(config, "config.json")
    return config


def end_tokens_of(values: JsonObject, text: JsonObject, generation: JsonObject) -> tuple[int, ...]:
    """Tokens that end an answer, the one that training learns first; empty if no file has any.

    Args:
      values: Contents of config.json.
      text: The part of it for the language model, which may be all of it.
      generation: Contents of generation_config.json; empty if there is none.

    Raises:
      ConfigError: If the places contradict each other (`stated.end_tokens`).
    """
    stated = {
        "generation_config.json": generation.get("eos_token_id"),
        "config.json": values.get("eos_token_id"),
        "text_config": text.get("eos_token_id"),
    }
    return end_tokens(stated, END_TOKENS.get(text["model_type"]))


def require_rows(config: ModelConfig, place: str) -> None:
    """Raises ConfigError unless the embedding has a row for each token that the model names.

    JAX would read the last row in place of one that is missing.
    """
    rows = config.decoder.vocab_size
    for name in ("image_token_id", "end_token_id", "other_end_token_ids"):
        found = getattr(config, name)
        largest = max(found, default=0) if isinstance(found, tuple) else found
        require(
            largest < rows,
            f"{name} in {place}",
            found,
            f"less than {rows}, the number of rows of the embedding (vocab_size)",
        )


def model_to_json(config: ModelConfig, dtype: str) -> JsonObject:
    """Contents of the config.json of a LlavaForConditionalGeneration.

    Raises:
      ConfigError: As `decoder_to_json`.
    """
    return {
        "architectures": [CLASSES["llava"]],
        "model_type": "llava",
        "text_config": decoder_to_json(
            config.decoder, dtype, config.end_token_ids, config.end_token_id
        ),
        "vision_config": vision_to_json(config.vision),
        "image_token_index": config.image_token_id,
        "image_seq_length": config.vision.num_features,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision.feature_layer,
        "vision_feature_select_strategy": feature_strategy(config.vision.family),
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "eos_token_id": one_or_all(config.end_token_ids),
        "pad_token_id": config.end_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def to_files(
    config: ModelConfig | DecoderConfig | VisionConfig,
    dtype: str,
    end_token_ids: Sequence[int] = (),
) -> dict[str, JsonObject]:
    """Contents, by file name, of the JSON files that describe a model or a part of one.

    Args:
      config: Configuration of the model or of the part.
      dtype: Dtype of the weights.
      end_token_ids: Ids of the tokens that end a text of a language model alone.

    Raises:
      ConfigError: As `decoder_to_json`.
    """
    if isinstance(config, DecoderConfig):
        return {"config.json": decoder_to_json(config, dtype, end_token_ids)}
    if isinstance(config, VisionConfig):
        vision = config
        values = vision_to_json(vision) | {"dtype": dtype, "torch_dtype": dtype}
    else:
        vision = config.vision
        values = model_to_json(config, dtype)
    return {"config.json": values, "preprocessor_config.json": image_processor_to_json(vision)}
