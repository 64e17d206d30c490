"""Small random models of transformers, the oracles of the interop and parity tests.

Every parameter is random, norms and biases too, so that none can be missed unnoticed.
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

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IMAGE_TOKEN, END_TOKEN, VOCABULARY = 99, 98, 101

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TEXT |= {
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "attn_implementation": "eager",
}
TEXT |= {"eos_token_id": END_TOKEN, "pad_token_id": END_TOKEN}
MOE = {
    "num_hidden_layers": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
MOE |= {
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
}
TOWER |= {"attn_implementation": "eager"}


CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
}
CLASSES |= {
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "llava": "LlavaForConditionalGeneration",
}
CLASSES |= {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "mistral": "MistralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def qwen2(**changes) -> Qwen2Config:
    return Qwen2Config(**TEXT | {"tie_word_embeddings": True} | changes)


def qwen2_moe(**changes) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(**TEXT | MOE | {"tie_word_embeddings": False} | changes)


def llama(**changes) -> LlamaConfig:
    return LlamaConfig(**TEXT | {"tie_word_embeddings": False} | changes)


def mistral(**changes) -> MistralConfig:
    return MistralConfig(**TEXT | {"tie_word_embeddings": False, "sliding_window": None} | changes)


def qwen3(**changes) -> Qwen3Config:
    return Qwen3Config(**TEXT | {"tie_word_embeddings": True, "head_dim": 16} | changes)


def qwen3_moe(**changes) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**TEXT | MOE | {"tie_word_embeddings": False, "head_dim": 16} | changes)


def clip(**changes) -> CLIPVisionConfig:
    return CLIPVisionConfig(**TOWER | changes)


def siglip(**changes) -> SiglipVisionConfig:
    return SiglipVisionConfig(**TOWER | {"vision_use_head": False} | changes)


def llava(vision, text, **changes) -> LlavaConfig:
    strategy = "default" if vision.model_type == "clip_vision_model" else "full"
    values = {
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
    }
    values |= {
        "image_seq_length": 9,
        "tie_word_embeddings": text.tie_word_embeddings,
        "attn_implementation": "eager",
    }
    return LlavaConfig(vision_config=vision, text_config=text, **values | changes)


def build(config, seed: int = 0) -> torch.nn.Module:
    """The model of a configuration in float32, all parameters drawn anew."""
    model = getattr(transformers, CLASSES[config.model_type])(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            centre = 1.0 if "norm" in path and path.endswith("weight") else 0.0
            spread = 0.3 if parameter.ndim < 2 else max(parameter.shape[-1], 1) ** -0.5
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: torch.nn.Module) -> dict:
    """Parameter name -> gradient f32 (zeros where nothing flowed), names as the live model has them."""
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy()
        for name, p in model.named_parameters()
    }


def load(path, vision_tower=None, tokenizer=None) -> tuple[Config, dict[str, np.ndarray]]:
    """Loads the configuration and the float32 parameters of the model in a folder.

    If the folder holds a part of a model (a vision tower or a language model), they are those of
    the part. Arguments and errors are those of `mod_jax.interop.loading.open_pretrained`.
    """
    with open_pretrained(path, vision_tower, tokenizer) as pretrained:
        return pretrained.config, read(pretrained)
