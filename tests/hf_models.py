"""Small random transformers models, the oracles of the interop and parity tests.

Every parameter is random, norms and biases included: a parameter that is ignored changes results.
"""

import numpy as np
import torch
import transformers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from mod_jax.interop.loading import open_pretrained
from mod_jax.interop.pretrained import Config, read

torch.set_num_threads(1)  # the order in which torch sums may depend on their number
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IMAGE_TOKEN, END_TOKEN, VOCABULARY = 99, 98, 101

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "attn_implementation": "eager",
    "eos_token_id": END_TOKEN,
    "pad_token_id": END_TOKEN,
}
MOE = {
    "num_hidden_layers": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1, 3],
    "moe_intermediate_size": 56,
    "shared_expert_intermediate_size": 0,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "attn_implementation": "eager",
}

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "llava": "LlavaForConditionalGeneration",
}  # model_type -> class


def qwen2(**changes) -> Qwen2Config:
    """A tied Qwen2 (also Qwen1.5 and Qwen2.5)."""
    return Qwen2Config(**TEXT | {"tie_word_embeddings": True} | changes)


def qwen2_moe(**changes) -> Qwen2MoeConfig:
    """An untied Qwen2-MoE, with dense layers in between and a shared expert of size 0."""
    return Qwen2MoeConfig(**TEXT | MOE | {"tie_word_embeddings": False} | changes)


def llama(**changes) -> LlamaConfig:
    """An untied Llama (also Vicuna)."""
    return LlamaConfig(**TEXT | {"tie_word_embeddings": False} | changes)


def mistral(**changes) -> MistralConfig:
    """An untied Mistral without a sliding window."""
    return MistralConfig(**TEXT | {"tie_word_embeddings": False, "sliding_window": None} | changes)


def qwen3(**changes) -> Qwen3Config:
    """A tied Qwen3; its heads are wider than hidden_size / num_attention_heads."""
    return Qwen3Config(**TEXT | {"tie_word_embeddings": True, "head_dim": 16} | changes)


def qwen3_moe(**changes) -> Qwen3MoeConfig:
    """An untied Qwen3-MoE, with dense layers in between."""
    return Qwen3MoeConfig(**TEXT | MOE | {"tie_word_embeddings": False, "head_dim": 16} | changes)


def clip(**changes) -> CLIPVisionConfig:
    """A CLIP tower."""
    return CLIPVisionConfig(**TOWER | changes)


def siglip(**changes) -> SiglipVisionConfig:
    """A SigLIP tower without its pooling head."""
    return SiglipVisionConfig(**TOWER | {"vision_use_head": False} | changes)


def llava(vision, text, **changes) -> LlavaConfig:
    """A LLaVA of a tower and a language model, which reads the tower's last layer but one."""
    strategy = "default" if vision.model_type == "clip_vision_model" else "full"
    values = {
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
        "image_seq_length": 9,
        "tie_word_embeddings": text.tie_word_embeddings,
        "attn_implementation": "eager",
    }
    return LlavaConfig(vision_config=vision, text_config=text, **values | changes)


def build(config, seed: int = 0) -> torch.nn.Module:
    """A float32 model of a configuration.

    Weights are normal with the standard deviation fan_in^-0.5, biases with 0.3 around 0, and scales
    of norms with 0.3 around 1.
    """
    model = getattr(transformers, CLASSES[config.model_type])(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            centre = 1.0 if "norm" in path and path.endswith("weight") else 0.0
            spread = 0.3 if parameter.ndim < 2 else max(parameter.shape[-1], 1) ** -0.5
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Name of each parameter -> its float32 gradient; zeros if no gradient reached it."""
    return {
        name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).numpy()
        for name, parameter in model.named_parameters()
    }


def load(path, vision_tower=None, tokenizer=None) -> tuple[Config, dict[str, np.ndarray]]:
    """Loads the configuration and the float32 parameters of the model in a folder.

    If the folder holds a part of a model (a vision tower or a language model), they are those of
    the part. Arguments and errors are those of `mod_jax.interop.loading.open_pretrained`.
    """
    with open_pretrained(path, vision_tower, tokenizer) as pretrained:
        return pretrained.config, read(pretrained)
