"""config.json of original LLaVA and its descendants, and of the LLaVA-MoD authors.

Original LLaVA is haotian-liu/LLaVA, the authors' code shufangxun/LLaVA-MoD. The sizes of the
language model are top-level keys, the vision tower is given by name, and the mixture of experts is
DeepSpeed's.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

from mod_jax.config import DecoderConfig, MoEConfig, VisionConfig, require
from mod_jax.interop.folder import JsonObject
from mod_jax.interop.hf_config import (
    check,
    counted_from_the_end,
    decoder_from_json,
    feature_strategy,
    require_fixed,
    vision_from_json,
)

# model_type -> model_type of the language model in transformers.
FAMILIES = {
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen1_5": "qwen2",
    "llava_qwen2": "qwen2",
    "moe_llava_llama": "llama",
    "moe_llava_mistral": "mistral",
    "moe_llava_qwen1_5": "qwen2",
    "moe_llava_qwen2": "qwen2",
}
# The same for the oldest files, whose model_type is "llava", by class.
ARCHITECTURES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "LlavaQwen2ForCausalLM": "qwen2",
}

# Class of Hugging Face's own llava.
STOCK = "LlavaForConditionalGeneration"

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
_CLIP: dict[str, JsonObject] = {
    "base-patch32": {},
    "base-patch16": {"patch_size": 16},
    "large-patch14": {**_LARGE, "patch_size": 14},
    "large-patch14-336": {**_LARGE, "patch_size": 14, "image_size": 336},
}
_SIGLIP: dict[str, JsonObject] = {
    "base-patch16-224": {},
    "base-patch16-256": {"image_size": 256},
    "base-patch16-384": {"image_size": 384},
    "base-patch16-512": {"image_size": 512},
    "large-patch16-256": {**_LARGE, "image_size": 256},
    "large-patch16-384": {**_LARGE, "image_size": 384},
    "so400m-patch14-224": {**_SO400M},
    "so400m-patch14-384": {**_SO400M, "image_size": 384},
}
# Name of a published tower -> its config.json; what that leaves out is the default of its class.
TOWERS: dict[str, JsonObject] = {
    f"openai/clip-vit-{name}": {"model_type": "clip_vision_model", **values}
    for name, values in _CLIP.items()
} | {
    f"google/siglip-{name}": {"model_type": "siglip_vision_model", **values}
    for name, values in _SIGLIP.items()
}

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
# vision_feature_select_strategy of transformers -> mm_vision_select_feature of original LLaVA.
SELECTED_FEATURES = {"default": "patch", "full": "cls_patch"}


def is_original(values: Mapping) -> bool:
    """Whether a config.json is of these models; Hugging Face's own llava has a text_config."""
    model_type = values.get("model_type")
    is_stock = values.get("text_config") is not None or values.get("architectures") == [STOCK]
    return model_type in FAMILIES or (model_type == "llava" and not is_stock)


def language_model_from_json(values: JsonObject) -> DecoderConfig:
    """Reads the configuration of the language model.

    Raises:
      ConfigError: Naming every option of the whole file that our model does not compute.
    """
    defaults = {"mm_projector_type": "linear", "image_aspect_ratio": None}
    options = defaults | values
    if "image_projector_type" in values:
        options["mm_projector_type"] = values["image_projector_type"]
    lora = values.get("lora") or {}
    decoder, moe, *_ = check(
        lambda: decoder_from_json(values | {"model_type": family(values)}),
        lambda: _moe_from_json(values.get("moe") or {}),
        lambda: require_fixed(options, FIXED, "the only values that the model computes"),
        lambda: require(
            not lora.get("lora_enable"),
            "lora",
            lora,
            "whole weights, not a LoRA",
            "Merge it into the model that it was trained on first.",
        ),
    )
    return dataclasses.replace(decoder, moe=moe)


def family(values: JsonObject) -> str:
    """model_type of the language model in transformers."""
    if values["model_type"] in FAMILIES:
        return FAMILIES[values["model_type"]]
    architecture = (values.get("architectures") or [None])[0]
    require(
        architecture in ARCHITECTURES,
        "architectures",
        architecture,
        f"one of {sorted(ARCHITECTURES)}, as model_type is 'llava' and there is no text_config",
    )
    return ARCHITECTURES[architecture]


def _moe_from_json(moe: JsonObject) -> MoEConfig | None:
    """What DeepSpeed's layer (deepspeed/moe, top-2 gating) computes at inference.

    There the capacity factor is eval_capacity_factor.
    """
    if not moe.get("moe_enable"):
        return None
    layers = moe.get("moe_layers_idx")
    experts = moe.get("num_experts")
    experts_per_token = moe.get("top_k_experts")
    factor = moe.get("eval_capacity_factor")
    check(
        lambda: require(
            _is_uniform(layers, experts),
            "moe.num_experts",
            experts,
            f"the same number for each of moe_layers_idx = {layers}",
        ),
        lambda: require(
            experts_per_token == 2,
            "moe.top_k_experts",
            experts_per_token,
            "2",
            "DeepSpeed weighs the single expert of top-1 gating by its probability and drops "
            "tokens at random: that gating is not read.",
        ),
        lambda: require(
            isinstance(factor, (int, float)), "moe.eval_capacity_factor", factor, "a number"
        ),
    )
    config = MoEConfig(
        layers=tuple(moe["moe_layers_idx"]),
        num_experts=moe["num_experts"][0],
        experts_per_token=moe["top_k_experts"],
        capacity_factor=float(moe["eval_capacity_factor"]),
        residual=bool(moe.get("use_residual")),
    )
    if config.dropless:
        return dataclasses.replace(config, capacity_factor=None)
    min_capacity = moe.get("min_capacity", 0)
    require(
        not min_capacity,
        "moe.min_capacity",
        min_capacity,
        "0 where tokens can be dropped, as the capacity of an expert has no minimum here",
    )
    return config


def _is_uniform(layers: object, experts: object) -> bool:
    """Whether `experts` lists one and the same number of experts for each of the layers."""
    if not isinstance(layers, list) or not isinstance(experts, list):
        return False
    return len(layers) == len(experts) and len(set(experts)) == 1


def tower_name(values: Mapping) -> str:
    """Name or folder of the vision tower, from the authors' key or from original LLaVA's."""
    return str(values.get("mm_image_tower") or values.get("mm_vision_tower"))


def tower_folder(values: Mapping) -> pathlib.Path | None:
    """The tower's name, if it is a local folder."""
    folder = pathlib.Path(tower_name(values))
    return folder if folder.is_dir() else None


def published_tower(values: Mapping) -> VisionConfig:
    """Configuration of a published tower, by its name.

    Raises:
      ConfigError: For a name that is not in TOWERS.
    """
    name = tower_name(values)
    require(
        name in TOWERS,
        "vision tower",
        name,
        f"a local folder, or one of {sorted(TOWERS)}",
        "Name its folder: --vision-tower FOLDER.",
    )
    return vision_from_json(TOWERS[name], {})


def with_features(tower: VisionConfig, values: JsonObject) -> VisionConfig:
    """Makes a tower give the features that the file names.

    Raises:
      ConfigError: For features other than all patches of one layer.
    """
    layer = values.get("mm_vision_select_layer")
    feature = values.get("mm_vision_select_feature", "patch")
    expected = SELECTED_FEATURES[feature_strategy(tower.family)]
    require(isinstance(layer, int), "mm_vision_select_layer", layer, "the number of one layer")
    require(
        feature == expected,
        "mm_vision_select_feature",
        feature,
        f"{expected!r}, the only feature of a {tower.family} tower that the model computes",
    )
    layer = counted_from_the_end(values["mm_vision_select_layer"], tower.num_layers)
    return dataclasses.replace(tower, feature_layer=layer)
