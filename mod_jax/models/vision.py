"""The vision tower: CLIP or SigLIP, from uint8 pixels to feature vectors.

Axes: M pictures, G patches along a side, P values of a patch (row, column, channel), T positions,
D width, N heads, H head size, F width of the feed-forward layer, L layers.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mod_jax.batch import Array
from mod_jax.config import VisionConfig
from mod_jax.models.parameters import constant, multiplied, weight
from mod_jax.models.remat import rematerialised
from mod_jax.ops.attention import attention
from mod_jax.ops.linear import add
from mod_jax.sharding import constrain_rows

T = TypeVar("T")  # an array or its shape

# Prefix of the tower's parameters in the flat dict of a multimodal model (`models/llava.py`).
TOWER_PREFIX = "vision_tower."

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def without_tower(params: Mapping[str, T]) -> dict[str, T]:
    """Returns the parameters of a model without those of its vision tower."""
    return {name: value for name, value in params.items() if not name.startswith(TOWER_PREFIX)}


class LayerNorm(nnx.Module):
    """Layer norm over D, or a stack of them; statistics and scaling in float32."""

    def __init__(self, stack: tuple[int, ...], size: int, eps: float):
        self.eps = eps
        self.scale_d = constant(stack, (size,), (None,), 1.0)
        self.bias_d = constant(stack, (size,), (None,), 0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """f[..., D] -> f[..., D], same dtype."""
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale_d[...] + self.bias_d[...]).astype(x.dtype)


class VisionAttention(nnx.Module):
    """Bidirectional multi-head attention with biases, or a stack of them."""

    def __init__(self, config: VisionConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        width, heads = config.hidden_size, config.num_heads
        size = width // heads

        def projection() -> nnx.Dict:
            shape, axes = (width, heads, size), ("embed", "heads", None)
            return nnx.Dict(
                w_dnh=weight(rngs, stack, shape, axes, width**-0.5),
                b_nh=constant(stack, (heads, size), ("heads", None), 0.0),
            )

        self.query = projection()
        self.key = projection()
        self.value = projection()
        self.out = nnx.Dict(
            w_nhd=weight(rngs, stack, (heads, size, width), ("heads", None, "embed"), width**-0.5),
            b_d=constant(stack, (width,), (None,), 0.0),
        )

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[M,T,D] -> f[M,T,D]; every position attends to every position of its picture."""

        def project(projection: nnx.Dict) -> jax.Array:
            return add(multiplied(x, projection.w_dnh), projection.b_nh[...])

        heads = attention(project(self.query), project(self.key), project(self.value))
        return add(multiplied(heads, self.out.w_nhd, inputs=2), self.out.b_d[...])


class VisionMLP(nnx.Module):
    """Linear, activation, linear; one layer or a stack of them."""

    def __init__(self, config: VisionConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.up = nnx.Dict(
            w_df=weight(rngs, stack, (width, inner), ("embed", "mlp"), width**-0.5),
            b_f=constant(stack, (inner,), ("mlp",), 0.0),
        )
        self.down = nnx.Dict(
            w_fd=weight(rngs, stack, (inner, width), ("mlp", "embed"), inner**-0.5),
            b_d=constant(stack, (width,), (None,), 0.0),
        )

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[M,T,D] -> f[M,T,D]."""
        inner = add(multiplied(x, self.up.w_df), self.up.b_f[...])
        return add(
            multiplied(ACTIVATIONS[self.activation](inner), self.down.w_fd), self.down.b_d[...]
        )


class VisionLayer(nnx.Module):
    """A pre-norm transformer layer, or a stack of them."""

    def __init__(self, config: VisionConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        self.norm_1 = LayerNorm(stack, config.hidden_size, config.norm_eps)
        self.attention = VisionAttention(config, stack, rngs)
        self.norm_2 = LayerNorm(stack, config.hidden_size, config.norm_eps)
        self.mlp = VisionMLP(config, stack, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies one layer (a stack is sliced first): f[M,T,D] -> f[M,T,D]."""
        x = constrain_rows(x + self.attention(self.norm_1(x)))
        return constrain_rows(x + self.mlp(self.norm_2(x)))


class VisionTower(nnx.Module):
    """Features of pictures: a hidden state of CLIP or SigLIP, without CLIP's CLS position.

    Args:
      config: Sizes and family.
      dtype: Dtype of the activations, "float32" or "bfloat16".
      remat: As in `ModelConfig`.
      rngs: Random number generators with a stream `params`.
    """

    def __init__(self, config: VisionConfig, dtype: str, remat: str, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        self.remat = remat
        width = config.hidden_size
        pixels = config.patch_size**2 * 3
        clip = config.family == "clip"
        projection = weight(rngs, (), (pixels, width), (None, None), pixels**-0.5)
        positions = config.num_features + int(clip)  # CLIP has a CLS position before the patches
        self.positions = nnx.Dict(w_td=weight(rngs, (), (positions, width), (None, None), 0.02))
        if clip:
            self.class_embedding_d = weight(rngs, (), (width,), (None,), width**-0.5)
            self.patches = nnx.Dict(w_pd=projection)
            self.pre_norm = LayerNorm((), width, config.norm_eps)
        else:
            self.patches = nnx.Dict(w_pd=projection, b_d=constant((), (width,), (None,), 0.0))
        self.layers = VisionLayer(config, (config.num_layers,), rngs)
        self.post_norm = LayerNorm((), width, config.norm_eps)

    @jax.named_scope("vision_tower")
    def __call__(self, images: Array) -> jax.Array:
        """Features of pictures.

        Args:
          images: u8[..., H, W, 3] with H = W = `image_size`.

        Returns:
          f[..., features, D]: the output of layer `num_layers + 1 + feature_layer` (counted from 1)
          without the post-norm, which is `hidden_states[feature_layer]` in transformers. The layers
          after it are not run.

        Raises:
          ValueError: If the pictures have another size.
        """
        size = self.config.image_size
        if images.shape[-3:] != (size, size, 3):
            raise ValueError(
                f"images of shape {images.shape}: expected [..., {size}, {size}, 3]. Resize them "
                "to vision.image_size."
            )
        x = constrain_rows(self._embed(jnp.asarray(images).reshape(-1, size, size, 3)))
        layers_run = self.config.num_layers + 1 + self.config.feature_layer
        layer = rematerialised(self.remat, VisionLayer.__call__)
        x, _ = jax.lax.scan(
            lambda x, params: (layer(params, x), None),
            x,
            jax.tree.map(lambda w: w[:layers_run], self.layers),
        )
        features = x[:, -self.config.num_features :]  # drops CLS, the first position of CLIP
        return features.reshape(*images.shape[:-3], *features.shape[1:])

    @jax.named_scope("patch_embedding")
    def _embed(self, images: jax.Array) -> jax.Array:
        """Embeds normalised patches and adds the position embeddings: u8[M,H,W,3] -> f[M,T,D]."""
        config, dtype = self.config, jnp.dtype(self.dtype)
        pixels = images.astype(jnp.float32) / 255 - jnp.asarray(config.pixel_mean)
        pixels = pixels / jnp.asarray(config.pixel_std)
        patches = patchify(pixels.astype(dtype), config.patch_size)
        x = multiplied(patches, self.patches.w_pd)
        if config.family == "siglip":
            return add(add(x, self.patches.b_d[...]), self.positions.w_td[...])
        class_m1d = jnp.broadcast_to(self.class_embedding_d[...], (len(x), 1, config.hidden_size))
        x = jnp.concatenate([class_m1d.astype(dtype), x], axis=1)
        return self.pre_norm(add(x, self.positions.w_td[...]))


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """Cuts pictures into patches, row by row: f[M,H,W,3] -> f[M,G*G,P].

    Pixels at the right and bottom border that fill no whole patch are left out, as in a strided
    convolution.

    Args:
      images: f[M,H,W,3] with H = W.
      patch: Side of a patch in pixels.
    """
    # equivalent to: the im2col of a convolution with kernel = stride = patch
    count = len(images)
    side = images.shape[1] // patch
    whole = images[:, : side * patch, : side * patch]
    tiles = whole.reshape(count, side, patch, side, patch, 3).swapaxes(2, 3)
    return tiles.reshape(count, side * side, patch * patch * 3)
