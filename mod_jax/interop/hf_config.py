"""Hugging Face's config.json and ours, in both directions.

A file says only what differs from its class's defaults, so the defaults of the classes (transformers) are written down
here. What our models cannot compute (another activation, scaled rotary angles, ...) is refused, never ignored.
"""

from mod_jax.config import DecoderConfig, ModelConfig, MoEConfig, VisionConfig, require

_LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA |= {"num_key_value_heads": None, "rms_norm_eps": 1e-6}
_QWEN = _LLAMA | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
_QWEN_MOE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16}
_QWEN_MOE |= {"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
_QWEN_MOE |= {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "qkv_bias": True}
TEXT_DEFAULTS = {"llama": _LLAMA, "qwen2": _QWEN, "qwen3": _QWEN | {"head_dim": 128}, "qwen2_moe": _QWEN | _QWEN_MOE}

_TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
VISION_DEFAULTS = {
    "clip_vision_model": _TOWER | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": _TOWER | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}

TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
STRATEGIES = {"clip": "default", "siglip": "full"}  # "default" drops the first feature: CLIP's CLS, but a real patch of SigLIP
SIGLIP_MEAN_STD = {"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.5, 0.5, 0.5)}
DENSE_FAMILIES = {(True, False): "qwen2", (False, False): "llama", (False, True): "qwen3"}  # (qkv_bias, qk_norm)
CLASSES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}
CLASSES |= {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel", "llava": "LlavaForConditionalGeneration"}


def decoder_from_json(values: dict, tie_embeddings: bool = False) -> DecoderConfig:
    """A text configuration; `tie_embeddings` holds where it does not say.

    Raises:
      ConfigError: for a family or an option that the decoder does not have.
    """
    family = values.get("model_type")
    require(family in TEXT_DEFAULTS, "model_type", family, f"a language model of {sorted(TEXT_DEFAULTS)}")
    c = TEXT_DEFAULTS[family] | values
    for key, fixed in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}.items():
        require(c.get(key, fixed) == fixed, key, c.get(key), f"{fixed!r}, all that the decoder computes")
    return DecoderConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"] or c["num_attention_heads"],
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        rope_theta=_rope_theta(c),
        norm_eps=c["rms_norm_eps"],
        qkv_bias=c.get("qkv_bias", family == "qwen2"),
        qk_norm=family == "qwen3",
        tie_embeddings=c.get("tie_word_embeddings", tie_embeddings),
        moe=_moe_from_json(c) if family == "qwen2_moe" else None,
    )


def _rope_theta(values: dict) -> float:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # 5.x | 4.x
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind == "default", "rope_type", kind, "'default', all that the decoder computes")
    return float(rope.get("rope_theta", values.get("rope_theta", 10000.0)))


def _moe_from_json(c: dict) -> MoEConfig:
    fixed = {"norm_topk_prob": True, "shared_expert_intermediate_size": 0, "moe_intermediate_size": c["intermediate_size"]}
    for key, value in fixed.items():
        require(c[key] == value, key, c[key], f"{value!r}, all that the mixture of experts computes")
    step, dense = c["decoder_sparse_step"], c["mlp_only_layers"]
    layers = tuple(number for number in range(c["num_hidden_layers"]) if number not in dense and (number + 1) % step == 0)
    return MoEConfig(layers=layers, num_experts=c["num_experts"], experts_per_token=c["num_experts_per_tok"])


def decoder_to_json(config: DecoderConfig, dtype: str, end_token_id: int | None = None) -> dict:
    """The text configuration that stock transformers (4.46 to 5.x) and vLLM compute as our decoder does.

    Raises:
      ConfigError: where no family of transformers is an exact match.
    """
    described = (config.qkv_bias, config.qk_norm)
    known = described in DENSE_FAMILIES
    require(known, "decoder.qkv_bias, qk_norm", described, f"one of {list(DENSE_FAMILIES)}: no other has a match in transformers")
    family = "qwen2_moe" if config.moe else DENSE_FAMILIES[described]
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
        "max_position_embeddings": 32768,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # 4.x reads this one, 5.x the next
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    values |= {} if end_token_id is None else {"eos_token_id": end_token_id, "pad_token_id": end_token_id}
    return values | (_moe_to_json(config) if config.moe else {})


def _moe_to_json(config: DecoderConfig) -> dict:
    moe, matched = config.moe, {"qkv_bias": True, "qk_norm": False, "moe.residual": False, "moe.capacity_factor": None}
    found = {"qkv_bias": config.qkv_bias, "qk_norm": config.qk_norm, "moe.residual": moe.residual, "moe.capacity_factor": moe.capacity_factor}
    remedy = "A model trained with a capacity is exported as a dropless one by setting moe.capacity_factor to None."
    require(found == matched, "decoder", found, f"{matched}: qwen2_moe computes nothing else", remedy)
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [number for number in range(config.num_layers) if number not in config.sparse_layers],
        "moe_intermediate_size": config.intermediate_size,
        "shared_expert_intermediate_size": 0,
        "qkv_bias": True,
    }


def vision_from_json(values: dict, processor: dict, feature_layer: int = -2) -> VisionConfig:
    """A vision configuration, the pixel statistics from the image processor's (empty: those of the family)."""
    kind = values.get("model_type")
    require(kind in TOWERS, "model_type", kind, f"a vision tower of {sorted(TOWERS)}")
    c = VISION_DEFAULTS[kind] | values
    require(c["hidden_act"] in ACTIVATIONS, "vision_config.hidden_act", c["hidden_act"], f"one of {sorted(ACTIVATIONS)}")
    pixels = SIGLIP_MEAN_STD if kind == "siglip_vision_model" else {}
    if "image_mean" in processor:
        pixels = {"pixel_mean": tuple(processor["image_mean"]), "pixel_std": tuple(processor["image_std"])}
    return VisionConfig(
        family=TOWERS[kind],
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        hidden_act=ACTIVATIONS[c["hidden_act"]],
        norm_eps=c["layer_norm_eps"],
        feature_layer=feature_layer,
        **pixels,
    )


def vision_to_json(config: VisionConfig) -> dict:
    kind = next(kind for kind, family in TOWERS.items() if family == config.family)
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.hidden_act),
        "layer_norm_eps": config.norm_eps,
    } | ({"projection_dim": config.hidden_size} if config.family == "clip" else {"vision_use_head": False})


def processor_to_json(config: VisionConfig) -> dict:
    """What preprocessor_config.json says of a picture: padded to a square, resized, normalised (method, section 4)."""
    size = config.image_size
    return {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
    }


def model_from_json(values: dict, processor: dict) -> ModelConfig:
    """A llava configuration."""
    text, fixed = values["text_config"], {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
    for key, value in fixed.items():
        require(values.get(key, value) == value, key, values.get(key), f"{value!r}, all that the adaptor computes")
    vision = vision_from_json(values["vision_config"], processor, values.get("vision_feature_layer", -2))
    strategy = values.get("vision_feature_select_strategy", "default")
    require(strategy == STRATEGIES[vision.family], "vision_feature_select_strategy", strategy, f"{STRATEGIES[vision.family]!r} with {vision.family}")
    end = text.get("eos_token_id", values.get("eos_token_id"))
    end = end[0] if isinstance(end, list) else end
    return ModelConfig(
        vision=vision,
        decoder=decoder_from_json(text, values.get("tie_word_embeddings", False)),
        image_token_id=values.get("image_token_index", values.get("image_token_id", 32000)),
        **({} if end is None else {"end_token_id": end}),
    )


def model_to_json(config: ModelConfig, dtype: str) -> dict:
    return {
        "architectures": [CLASSES["llava"]],
        "model_type": "llava",
        "text_config": decoder_to_json(config.decoder, dtype, config.end_token_id),
        "vision_config": vision_to_json(config.vision),
        "image_token_index": config.image_token_id,
        "image_seq_length": config.vision.num_features,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision.feature_layer,
        "vision_feature_select_strategy": STRATEGIES[config.vision.family],
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "eos_token_id": config.end_token_id,
        "pad_token_id": config.end_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
