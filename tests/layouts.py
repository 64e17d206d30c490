"""Writes models of transformers as the folders that people have.

The layouts differ in the names of the tensors, in the files, and in config.json.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from transformers import LlavaProcessor


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model and its processor.

    Attributes:
      model: The model.
      processor: Its processor.
      tokenizer: Its tokenizer without `<image>`, for layouts that do not have that token.
    """

    model: torch.nn.Module
    processor: LlavaProcessor
    tokenizer: object


# Names of tensors: those of a model object of transformers 5.x, changed by (pattern, replacement)
# pairs, one after the other.

TO_4X = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.multi_modal", "multi_modal"),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
)
TO_5X_OF_OLD = ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),)
TO_ORIGINAL = (
    (r"^model\.language_model\.", "model."),
    (r"multi_modal_projector\.linear_1", "mm_projector.0"),
    (r"multi_modal_projector\.linear_2", "mm_projector.2"),
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
)
TO_AUTHORS = (
    *TO_ORIGINAL,
    (r"mm_projector\.", "mm_projector.image_spatial_proj."),
    (r"vision_tower\.vision_tower\.", "image_tower.image_tower."),
    (r"\.mlp\.gate\.", ".mlp.deepspeed_moe.gate.wg."),
    (r"\.mlp\.experts\.", ".mlp.deepspeed_moe.experts.deepspeed_experts."),
)


def renamed(tensors: dict[str, torch.Tensor], pairs) -> dict[str, torch.Tensor]:
    """Renames tensors by (pattern, replacement) pairs."""
    result = {}
    for name, tensor in tensors.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of a model object, except shared experts (of size 0) and their gates."""
    return {
        name: tensor for name, tensor in model.state_dict().items() if ".shared_expert" not in name
    }


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Splits fused experts (gate_up_proj [E,2F,D], down_proj [E,D,F]) into tensors of their own."""
    parts_of = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    result = {}
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf not in parts_of:
            result[name] = tensor
            continue
        parts = parts_of[leaf]
        for part, piece in zip(parts, tensor.chunk(len(parts), dim=1)):
            for expert in range(len(tensor)):
                result[f"{prefix}.{expert}.{part}.weight"] = piece[expert]
    return result


# Files


def save_safetensors(tensors: dict[str, torch.Tensor], folder: pathlib.Path) -> None:
    """Writes one safetensors file."""
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def save_bin(tensors: dict[str, torch.Tensor], folder: pathlib.Path) -> None:
    """Writes one PyTorch file."""
    torch.save(tensors, folder / "pytorch_model.bin")


# Folders


def saved_by_transformers(checkpoint: Checkpoint, folder: pathlib.Path, **options) -> None:
    """Writes a folder as transformers does."""
    checkpoint.model.save_pretrained(folder, **options)
    checkpoint.processor.save_pretrained(folder)


def llava_hf(checkpoint: Checkpoint, folder: pathlib.Path, pairs=(), fused: bool = False) -> None:
    """Writes a folder as transformers does, except for the names of tensors and the experts."""
    saved_by_transformers(checkpoint, folder)
    tensors = live_tensors(checkpoint.model)
    save_safetensors(renamed(tensors if fused else apart(tensors), pairs), folder)


def original(
    checkpoint: Checkpoint,
    folder: pathlib.Path,
    save: Callable,
    pairs,
    values: dict,
    tower_in_file: bool = True,
) -> None:
    """Writes a folder of original LLaVA, or of a project that was made from it.

    Its configuration has no nested objects and names the folder of the tower, and its tokenizer has
    no `<image>`.

    Args:
      checkpoint: The model.
      folder: Folder to write to, which exists.
      save: Function that writes the tensors.
      pairs: Changes of the tensors' names, see `renamed`.
      values: Further values of config.json.
      tower_in_file: Whether the weights include the tower.
    """
    config = checkpoint.model.config
    tower = folder / "tower"
    described = config.text_config.to_dict() | {
        "architectures": [],
        "mm_hidden_size": config.vision_config.hidden_size,
        "image_aspect_ratio": "pad",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": str(tower),
        "mm_image_tower": str(tower),
        "image_projector_type": "mlp2x_gelu",
    }
    checkpoint.model.model.vision_tower.save_pretrained(tower)
    checkpoint.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(described | values))
    tensors = renamed(apart(live_tensors(checkpoint.model)), pairs)
    if not tower_in_file:
        tensors = {name: tensor for name, tensor in tensors.items() if "_tower." not in name}
    save(tensors, folder)


DEEPSPEED = {
    "moe_enable": True,
    "moe_layers_idx": [0, 2],
    "num_experts": [4, 4],
    "top_k_experts": 2,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 2.0,
    "min_capacity": 0,
    "use_residual": False,
    "router_aux_loss_coef": 0.01,
}

LAYOUTS: dict[str, Callable[[Checkpoint, pathlib.Path], None]] = {
    "llava-hf, as transformers 5.23 saves it": saved_by_transformers,
    "llava-hf, in shards": functools.partial(saved_by_transformers, max_shard_size="100KB"),
    "llava-hf, names of 4.x": functools.partial(llava_hf, pairs=TO_4X),
    "llava-hf, names of 5.x": functools.partial(llava_hf, fused=True),
    "llava-hf, names of 5.x with vision_model": functools.partial(
        llava_hf, pairs=TO_5X_OF_OLD, fused=True
    ),
    "original LLaVA, safetensors": functools.partial(
        original, save=save_safetensors, pairs=TO_ORIGINAL, values={"model_type": "llava_llama"}
    ),
    "original LLaVA, .bin, without its tower": functools.partial(
        original,
        save=save_bin,
        pairs=TO_ORIGINAL,
        values={"model_type": "llava_llama"},
        tower_in_file=False,
    ),
    "LLaVA-MoD authors' dense, .bin": functools.partial(
        original, save=save_bin, pairs=TO_AUTHORS, values={"model_type": "llava_qwen2"}
    ),
    "LLaVA-MoD authors' sparse, .bin": functools.partial(
        original,
        save=save_bin,
        pairs=TO_AUTHORS,
        values={"model_type": "moe_llava_qwen2", "moe": DEEPSPEED},
    ),
}
