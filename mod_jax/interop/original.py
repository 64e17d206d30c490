"""config.json of original LLaVA (haotian-liu/LLaVA and its descendants) and of the LLaVA-MoD authors (shufangxun/LLaVA-MoD).

Text sizes lie flat in it, the vision tower is a name, and the mixture of experts is DeepSpeed's.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

from mod_jax.config import DecoderConfig, MoEConfig, VisionConfig, require
from mod_jax.interop.hf_config import check, decoder_from_json, require_fixed, vision_from_json

FAMILIES = {
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen1_5": "qwen2",
    "llava_qwen2": "qwen2",
}
FAMILIES |= {
    f"moe_{kind}": FAMILIES[kind]
    for kind in ("llava_llama", "llava_mistral", "llava_qwen1_5", "llava_qwen2")
}
ARCHITECTURES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "LlavaQwen2ForCausalLM": "qwen2",
}

_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
# What config.json of the published towers says; the rest is as the defaults of their class.
TOWERS = {f"openai/clip-vit-{name}": {"model_type": "clip_vision_model"} | values for name, values in {
    "base-patch32": {},
    "base-patch16": {"patch_size": 16},
    "large-patch14": _LARGE | {"patch_size": 14},
    "large-patch14-336": _LARGE | {"patch_size": 14, "image_size": 336},
}.items()}  # fmt: skip
TOWERS |= {f"google/siglip-{name}": {"model_type": "siglip_vision_model"} | values for name, values in {
    "base-patch16-224": {},
    "base-patch16-256": {"image_size": 256},
    "base-patch16-384": {"image_size": 384},
    "base-patch16-512": {"image_size": 512},
    "large-patch16-256": _LARGE | {"image_size": 256},
    "large-patch16-384": _LARGE | {"image_size": 384},
    "so400m-patch14-224": _SO400M,
    "so400m-patch14-384": _SO400M | {"image_size": 384},
}.items()}  # fmt: skip

FIXED = {
    "mm_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "pad",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_resampler_type": None,
    "mm_video_tower": None,
    "s2": False,
    "quantization_config": None,
}
FEATURES = {
    "clip": "patch",
    "siglip": "cls_patch",
}  # "patch" drops the first feature, which of SigLIP is a real patch


def is_original(values: Mapping) -> bool:
    """Whether a config.json is one of these; Hugging Face's own llava has a text_config."""
    kind = values.get("model_type")
    return kind in FAMILIES or (kind == "llava" and "text_config" not in values)


def language_model_from_json(values: Mapping) -> DecoderConfig:
    """The language model.

    Raises:
      ConfigError: naming all that our model does not compute, in the rest of the file too.
    """
    said = {"mm_projector_type": "linear", "image_aspect_ratio": None} | values
    if "image_projector_type" in values:
        said["mm_projector_type"] = values["image_projector_type"]
    lora = values.get("lora") or {}
    decoder, moe, *_ = check(
        lambda: decoder_from_json(values | {"model_type": _family(values)}),
        lambda: _moe_from_json(values.get("moe") or {}),
        lambda: require_fixed(said, FIXED, "all that the model computes"),
        lambda: require(
            not lora.get("lora_enable"),
            "lora",
            lora,
            "whole weights, not a LoRA",
            "Merge it into the model it was trained on first.",
        ),
    )
    return dataclasses.replace(decoder, moe=moe)


def _family(values: Mapping) -> str:
    if values["model_type"] in FAMILIES:
        return FAMILIES[values["model_type"]]
    named = (values.get("architectures") or [None])[0]
    require(
        named in ARCHITECTURES,
        "architectures",
        named,
        f"one of {sorted(ARCHITECTURES)}, where the model_type is 'llava' and there is no text_config",
    )
    return ARCHITECTURES[named]


def _moe_from_json(moe: Mapping) -> MoEConfig | None:
    """What DeepSpeed's layer (deepspeed/moe, top-2 gating) computes at inference, where the factor is eval_capacity_factor."""
    if not moe.get("moe_enable"):
        return None
    layers, experts, choices, factor = (
        moe.get(key)
        for key in ("moe_layers_idx", "num_experts", "top_k_experts", "eval_capacity_factor")
    )
    lists = isinstance(layers, list) and isinstance(experts, list) and len(layers) == len(experts)
    reason = "DeepSpeed weighs the one expert of top-1 gating by its probability, this model by 1."
    check(
        lambda: require(
            lists and len(set(experts)) == 1,
            "moe.num_experts",
            experts,
            f"the same number for each of moe_layers_idx = {layers}",
        ),
        lambda: require(choices == 2, "moe.top_k_experts", choices, "2", reason),
        lambda: require(
            isinstance(factor, (int, float)), "moe.eval_capacity_factor", factor, "a number"
        ),
    )
    made = MoEConfig(
        tuple(layers), experts[0], choices, float(factor), bool(moe.get("use_residual"))
    )
    if made.dropless:
        return dataclasses.replace(made, capacity_factor=None)
    least = moe.get("min_capacity", 0)
    require(
        not least,
        "moe.min_capacity",
        least,
        "0 where tokens can be dropped: an expert's capacity has no least value here",
    )
    return made


def tower_name(values: Mapping) -> str:
    """Name or folder of the vision tower: the authors' key, or original LLaVA's."""
    return str(values.get("mm_image_tower") or values.get("mm_vision_tower"))


def tower_folder(values: Mapping) -> pathlib.Path | None:
    """The local folder that the tower's name is, if it is one."""
    folder = pathlib.Path(tower_name(values))
    return folder if folder.is_dir() else None


def published_tower(values: Mapping) -> VisionConfig:
    """The tower that a well-known name stands for. Raises ConfigError for any other name."""
    name = tower_name(values)
    require(
        name in TOWERS,
        "vision tower",
        name,
        f"a local folder, or one of {sorted(TOWERS)}",
        "Name its folder: --vision-tower FOLDER.",
    )
    return vision_from_json(TOWERS[name], {})


def with_features(tower: VisionConfig, values: Mapping) -> VisionConfig:
    """The tower, giving the features that the file says. Raises ConfigError for others than all patches of one layer."""
    layer, feature = (
        values.get("mm_vision_select_layer"),
        values.get("mm_vision_select_feature", "patch"),
    )
    expected = FEATURES[tower.family]
    require(isinstance(layer, int), "mm_vision_select_layer", layer, "one layer's number")
    require(
        feature == expected,
        "mm_vision_select_feature",
        feature,
        f"{expected!r} of a {tower.family} tower, all that the model computes",
    )
    return dataclasses.replace(tower, feature_layer=layer)
