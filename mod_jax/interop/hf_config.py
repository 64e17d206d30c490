"""Hugging Face's config.json and ours, in both directions.

A file says only what differs from its class's defaults, so the defaults of the classes (transformers) are written down
here. What our models cannot compute (another activation, scaled rotary angles, ...) is refused, never ignored, and one
error names all of it.
"""

from collections.abc import Callable, Mapping

from mod_jax.config import (
    ConfigError,
    DecoderConfig,
    ModelConfig,
    MoEConfig,
    VisionConfig,
    from_dict,
    require,
)
from mod_jax.interop.image_processor import image_processor_to_json

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_LLAMA |= {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
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
_MOE = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_QWEN2_MOE = _MOE | {
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
_QWEN2_MOE |= {
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "qkv_bias": True,
}
_QWEN3_MOE = _MOE | {
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
_QWEN3_MOE |= {"moe_intermediate_size": 768}
TEXT_DEFAULTS = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
TEXT_DEFAULTS |= {"qwen2_moe": _QWEN | _QWEN2_MOE, "qwen3_moe": _QWEN | _QWEN3_MOE}
WINDOW = 4096  # sliding_window of all classes, where one slides
END_TOKENS = {"llama": 2, "mistral": 2}  # of the classes; Qwen's have none

_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
VISION_DEFAULTS = {
    "clip_vision_model": _TOWER
    | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": _TOWER
    | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}

TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
STRATEGIES = {
    "clip": "default",
    "siglip": "full",
}  # "default" drops the first feature: CLIP's CLS, but a real patch of SigLIP
SIGLIP_MEAN_STD = {"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.5, 0.5, 0.5)}
DENSE_FAMILIES = {
    (True, False): "qwen2",
    (False, False): "llama",
    (False, True): "qwen3",
}  # (qkv_bias, qk_norm)
SPARSE_FAMILIES = {(True, False): "qwen2_moe", (False, True): "qwen3_moe"}
CLASSES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CLASSES |= {"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
CLASSES |= {
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "llava": "LlavaForConditionalGeneration",
}

TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
TEXT_SIZES += ("max_position_embeddings",)
MOE_SIZES = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
)
NULLABLE = ("num_key_value_heads", "head_dim")
VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)


def check(*checks: Callable) -> list:
    """What each check returns; one ConfigError with the messages of all that raise one."""
    made, wrong = [], []
    for one in checks:
        try:
            made.append(one())
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError(" ".join(wrong))
    return made


def require_fixed(values: Mapping, fixed: Mapping, why: str) -> None:
    """Raises ConfigError, naming every key of `fixed` that is there with another value."""
    wrong = {key: values[key] for key, only in fixed.items() if values.get(key, only) != only}
    require(not wrong, "config.json", wrong, f"{ {key: fixed[key] for key in wrong} }, {why}")


def _require_sizes(values: Mapping, keys: tuple[str, ...]) -> None:
    found = {
        key: values[key]
        for key in keys
        if key in values and not (key in NULLABLE and values[key] is None)
    }
    wrong = {key: size for key, size in found.items() if type(size) is not int or size < 1}
    require(not wrong, "config.json", wrong, "positive whole numbers")


def decoder_from_json(values: Mapping, tie_embeddings: bool = False) -> DecoderConfig:
    """A text configuration; `tie_embeddings` holds where it does not say.

    Raises:
      ConfigError: for a family or options that the decoder does not have.
    """
    family = values.get("model_type")
    require(
        family in TEXT_DEFAULTS,
        "model_type",
        family,
        f"a language model of {sorted(TEXT_DEFAULTS)}",
    )
    c, sparse = TEXT_DEFAULTS[family] | values, family in SPARSE_FAMILIES.values()
    fixed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
    }
    fixed |= {"norm_topk_prob": True, "shared_expert_intermediate_size": 0} if sparse else {}
    rope_theta, *_ = check(
        lambda: _rope_theta(c),
        lambda: _require_sizes(c, TEXT_SIZES + MOE_SIZES * sparse),
        lambda: require_fixed(c, fixed, "all that the decoder computes"),
    )
    moe = _moe_from_json(c) if sparse else None
    made = {
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
        "tie_embeddings": c.get("tie_word_embeddings", tie_embeddings),
        "max_positions": _max_positions(c),
        "moe": moe,
    }
    return from_dict(DecoderConfig, made, "text configuration")


def _rope_theta(c: Mapping):
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # 5.x | 4.x
    require(isinstance(rope, Mapping), "rope_parameters", rope, "an object")
    kind, theta = (
        rope.get("rope_type", rope.get("type", "default")),
        rope.get("rope_theta", c.get("rope_theta", 10000.0)),
    )
    require(kind == "default", "rope_type", kind, "'default', all that the decoder computes")
    return theta


def _max_positions(c: Mapping) -> int:
    """Attention within a sliding window is attention to everything, as long as a sequence is no longer than the window."""
    slides = c["model_type"] == "mistral" or c.get("use_sliding_window")
    window = c.get("sliding_window", WINDOW) if slides else None
    return min(c["max_position_embeddings"], window or c["max_position_embeddings"])


def _moe_from_json(c: Mapping) -> MoEConfig:
    step, dense = c["decoder_sparse_step"], c["mlp_only_layers"] or ()
    layers = tuple(
        number
        for number in range(c["num_hidden_layers"])
        if number not in dense and (number + 1) % step == 0
    )
    experts = c.get("num_local_experts", c["num_experts"])  # qwen3_moe of 5.x | all others
    return MoEConfig(layers=layers, num_experts=experts, experts_per_token=c["num_experts_per_tok"])


def _intermediate_size(c: Mapping, moe: MoEConfig | None) -> int:
    """One for dense layers and experts; where there are no dense layers their size means nothing."""
    if moe is None or len(moe.layers) == c["num_hidden_layers"]:
        return c["intermediate_size" if moe is None else "moe_intermediate_size"]
    require_fixed(
        c,
        {"moe_intermediate_size": c["intermediate_size"]},
        "the size of the dense layers, as each expert is a copy of one",
    )
    return c["intermediate_size"]


def decoder_to_json(config: DecoderConfig, dtype: str, end_token_id: int | None = None) -> dict:
    """The text configuration that stock transformers (4.46 to 5.x) and vLLM compute as our decoder does.

    Raises:
      ConfigError: where no family of transformers is an exact match.
    """
    described, families = (
        (config.qkv_bias, config.qk_norm),
        SPARSE_FAMILIES if config.moe else DENSE_FAMILIES,
    )
    require(
        described in families,
        "decoder.qkv_bias, qk_norm",
        described,
        f"one of {list(families)}: no other has a match in transformers",
    )
    family = families[described]
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
        "rope_theta": config.rope_theta,  # 4.x reads this one, 5.x the next
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    values |= (
        {} if end_token_id is None else {"eos_token_id": end_token_id, "pad_token_id": end_token_id}
    )
    return values | (_moe_to_json(config) if config.moe else {})


def _moe_to_json(config: DecoderConfig) -> dict:
    moe, remedy = (
        config.moe,
        "Exported as a dropless one (moe.capacity_factor None) it computes something else where tokens were dropped.",
    )
    require(
        not moe.residual,
        "moe.residual",
        moe.residual,
        "False: transformers has no shared expert that is mixed in by a softmax of two",
    )
    require(
        moe.dropless,
        "moe.capacity_factor",
        moe.capacity_factor,
        "None, or one that drops no token: transformers knows no capacity",
        remedy,
    )
    shared = (
        {"shared_expert_intermediate_size": 0, "qkv_bias": True}
        if config.qkv_bias
        else {"num_local_experts": moe.num_experts}
    )
    return shared | {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [
            number for number in range(config.num_layers) if number not in config.sparse_layers
        ],
        "moe_intermediate_size": config.intermediate_size,
    }


def vision_from_json(values: Mapping, processor: Mapping, feature_layer: int = -2) -> VisionConfig:
    """A vision configuration, the pixel statistics from the image processor's (empty: those of the family)."""
    kind = values.get("model_type")
    require(kind in TOWERS, "model_type", kind, f"a vision tower of {sorted(TOWERS)}")
    c = VISION_DEFAULTS[kind] | values
    check(
        lambda: _require_sizes(c, VISION_SIZES),
        lambda: require_fixed(c, {"quantization_config": None}, "float weights"),
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
            "one layer's number",
        ),
    )
    pixels = SIGLIP_MEAN_STD if kind == "siglip_vision_model" else {}
    if "image_mean" in processor:
        pixels = {
            "pixel_mean": tuple(processor["image_mean"]),
            "pixel_std": tuple(processor["image_std"]),
        }
    made = dict(
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
    return from_dict(VisionConfig, made, "vision configuration")


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
        "hidden_act": next(
            theirs for theirs, ours in ACTIVATIONS.items() if ours == config.hidden_act
        ),
        "layer_norm_eps": config.norm_eps,
    } | (
        {"projection_dim": config.hidden_size}
        if config.family == "clip"
        else {"vision_use_head": False}
    )


def model_from_json(values: Mapping, processor: Mapping, generation: Mapping) -> ModelConfig:
    """A llava configuration; `processor` is the image processor's file, `generation` generation_config.json (empty where there is none)."""
    text, tower = values.get("text_config"), values.get("vision_config")
    parts = isinstance(text, Mapping) and isinstance(tower, Mapping)
    require(parts, "text_config, vision_config", (text, tower), "an object each")
    fixed = {
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "quantization_config": None,
    }
    family = TOWERS.get(tower.get("model_type"), "clip")
    vision, decoder, _ = check(
        lambda: vision_from_json(tower, processor, values.get("vision_feature_layer", -2)),
        lambda: decoder_from_json(text, values.get("tie_word_embeddings", False)),
        lambda: require_fixed(
            {"vision_feature_select_strategy": "default"} | values,
            fixed | {"vision_feature_select_strategy": STRATEGIES[family]},
            f"all that the model computes (tower: {family})",
        ),
    )
    said = (
        text.get("eos_token_id"),
        values.get("eos_token_id"),
        generation.get("eos_token_id"),
        END_TOKENS.get(text["model_type"]),
    )
    end = next((end for end in said if end is not None), ModelConfig.end_token_id)
    return ModelConfig(
        vision=vision,
        decoder=decoder,
        image_token_id=values.get("image_token_index", values.get("image_token_id", 32000)),
        end_token_id=end[0] if isinstance(end, list) else end,
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


def to_files(config: ModelConfig | DecoderConfig | VisionConfig, dtype: str) -> dict[str, dict]:
    """File name -> contents of the JSON files that describe a model, or a part of one. Raises as `decoder_to_json`."""
    if isinstance(config, DecoderConfig):
        return {"config.json": decoder_to_json(config, dtype)}
    vision = config if isinstance(config, VisionConfig) else config.vision
    whole = (
        vision_to_json(vision) | {"dtype": dtype, "torch_dtype": dtype}
        if config is vision
        else model_to_json(config, dtype)
    )
    return {"config.json": whole, "preprocessor_config.json": image_processor_to_json(vision)}
