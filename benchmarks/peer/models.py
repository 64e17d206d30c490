"""Student and teacher in PyTorch: transformers' CLIP and Qwen2, DeepSpeed's mixture of experts."""

import contextlib
import os
import sys

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.sizes import FIRST_TEXT, TEACHER_WIDTH, Sizes

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
EXPERTS, EXPERTS_PER_TOKEN = 4, 2


class Model(nn.Module):
    """Vision tower, adaptor and language model.

    Args:
      sizes: Sizes of the student.
      scale: 1 for the student, TEACHER_WIDTH for the teacher.
    """

    def __init__(self, sizes: Sizes, scale: int = 1):
        super().__init__()
        self.features = sizes.features
        tower = CLIPVisionConfig(
            hidden_size=sizes.tower_width,
            intermediate_size=sizes.tower_inner,
            num_hidden_layers=sizes.tower_layers,
            num_attention_heads=sizes.tower_heads,
            image_size=sizes.image_size,
            patch_size=sizes.patch,
            attn_implementation="sdpa",
        )
        language_model = Qwen2Config(
            vocab_size=sizes.words,
            hidden_size=scale * sizes.width,
            intermediate_size=scale * sizes.inner,
            num_hidden_layers=sizes.layers,
            num_attention_heads=scale * sizes.heads,
            num_key_value_heads=scale * sizes.kv_heads,
            tie_word_embeddings=scale == 1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            initializer_range=(scale * sizes.width) ** -0.5,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation="sdpa",
        )
        width = scale * sizes.width
        self.vision_tower = CLIPVisionModel(tower)
        self.adaptor = nn.Sequential(
            nn.Linear(sizes.tower_width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.language_model = Qwen2ForCausalLM(language_model)

    @property
    def head(self) -> nn.Linear:
        return self.language_model.lm_head

    def embed(self, tokens: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings f32[B,S,D] of tokens i64[B,S], with the picture f32[B,3,H,W] at its place."""
        with torch.no_grad():
            states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
        picture = self.adaptor(states[-2][:, 1:])  # without CLS
        text = self.language_model.get_input_embeddings()(tokens)
        end = FIRST_TEXT + self.features
        return torch.cat([text[:, :FIRST_TEXT], picture, text[:, end:]], 1)

    def forward(self, tokens: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Hidden states f32[B,S,D] after the final norm."""
        embedded = self.embed(tokens, pixels)
        return self.language_model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state

    def balance(self) -> torch.Tensor:
        """The balance losses of the latest forward pass, summed over the sparse layers."""
        losses = [layer.balance for layer in self.modules() if isinstance(layer, Sparse)]
        return torch.stack(losses).sum()


class Sparse(nn.Module):
    """DeepSpeed's layer of four copies of a feed-forward layer, two for each token."""

    def __init__(self, width: int, feed_forward: nn.Module, capacity: float, sample: bool):
        super().__init__()
        from deepspeed.moe.layer import MoE

        with contextlib.redirect_stdout(sys.stderr):
            self.moe = MoE(
                width,
                expert=feed_forward,
                num_experts=EXPERTS,
                ep_size=1,
                k=EXPERTS_PER_TOKEN,
                capacity_factor=capacity,
                eval_capacity_factor=2.0,
                min_capacity=0,
                top2_2nd_expert_sampling=sample,
            )
            self.moe.set_deepspeed_parallelism()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, self.balance, _ = self.moe(x)
        return y


def start_deepspeed() -> None:
    """A process group of this process alone, which DeepSpeed's layers ask for."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    port = {"MASTER_PORT": 20000 + os.getpid() % 20000, "DS_ACCELERATOR": "cpu"}
    for key, value in (alone | port).items():
        os.environ.setdefault(key, str(value))
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def student(sizes: Sizes, capacity: float = 1.5, sample: bool = True) -> Model:
    """The sparse student; experts, routers and the adaptor train.

    Args:
      sizes: Its sizes.
      capacity: Factor of the places that an expert has in training.
      sample: Whether the second expert is drawn with Gumbel noise, as the authors leave it.
    """
    start_deepspeed()
    torch.manual_seed(1)
    model = Model(sizes)
    for layer in model.language_model.model.layers[::2]:
        layer.mlp = Sparse(sizes.width, layer.mlp, capacity, sample)
    _vary(model, 2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("adaptor.") or ".moe." in name)
    return model.train()


def teacher(sizes: Sizes, tower: nn.Module) -> Model:
    """The dense teacher, with the student's tower."""
    torch.manual_seed(3)
    model = Model(sizes, TEACHER_WIDTH)
    _vary(model, 4)
    model.vision_tower.load_state_dict(tower.state_dict())
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _vary(model: Model, seed: int) -> None:
    """Gives every bias and gain a value that matters, and every expert weights of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            is_gain = name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_gain else 0.02 * noise)
        elif ".experts." in name:
            parameter.add_(0.01 * noise)


def pixels_of(images: np.ndarray) -> torch.Tensor:
    """Normalised pixels f32[B,3,H,W] of pictures u8[B,H,W,3]."""
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    pixels = (images.astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
