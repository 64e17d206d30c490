"""The vision tower: CLIP or SigLIP, from bytes to feature vectors.

Axes: M pictures, G patches along a side, P pixels of a patch (row, column, channel), T positions, D width, N heads, H head size,
F feed-forward, L layers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mod_jax.config import VisionConfig
from mod_jax.models.parameters import constant, weight
from mod_jax.models.remat import REMAT
from mod_jax.ops.attention import attention

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class LayerNorm(nnx.Module):
    """Layer norm over D; statistics in float32."""

    def __init__(self, stack: tuple[int, ...], size: int, eps: float):
        self.eps = eps
        self.scale_d = constant(stack, (size,), ("embed",), 1.0)
        self.bias_d = constant(stack, (size,), ("embed",), 0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale_d[...] + self.bias_d[...]).astype(x.dtype)


class VisionAttention(nnx.Module):
    """Every position sees every position."""

    def __init__(self, config: VisionConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        width, heads, size = (
            config.hidden_size,
            config.num_heads,
            config.hidden_size // config.num_heads,
        )

        def projection() -> nnx.Dict:
            return nnx.Dict(
                w_dnh=weight(
                    rngs, stack, (width, heads, size), ("embed", "heads", None), width**-0.5
                ),
                b_nh=constant(stack, (heads, size), ("heads", None), 0.0),
            )

        self.query, self.key, self.value = projection(), projection(), projection()
        self.out = nnx.Dict(
            w_nhd=weight(rngs, stack, (heads, size, width), ("heads", None, "embed"), width**-0.5),
            b_d=constant(stack, (width,), ("embed",), 0.0),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (
            jnp.einsum("mtd,dnh->mtnh", x, p.w_dnh[...].astype(x.dtype))
            + p.b_nh[...].astype(x.dtype)
            for p in (self.query, self.key, self.value)
        )
        return jnp.einsum(
            "mtnh,nhd->mtd", attention(query, key, value), self.out.w_nhd[...].astype(x.dtype)
        ) + self.out.b_d[...].astype(x.dtype)


class VisionMLP(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(self, config: VisionConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.up = nnx.Dict(
            w_df=weight(rngs, stack, (width, inner), ("embed", "mlp"), width**-0.5),
            b_f=constant(stack, (inner,), ("mlp",), 0.0),
        )
        self.down = nnx.Dict(
            w_fd=weight(rngs, stack, (inner, width), ("mlp", "embed"), inner**-0.5),
            b_d=constant(stack, (width,), ("embed",), 0.0),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = jnp.einsum("mtd,df->mtf", x, self.up.w_df[...].astype(x.dtype)) + self.up.b_f[
            ...
        ].astype(x.dtype)
        inner = ACTIVATIONS[self.activation](inner)
        return jnp.einsum(
            "mtf,fd->mtd", inner, self.down.w_fd[...].astype(x.dtype)
        ) + self.down.b_d[...].astype(x.dtype)


class VisionLayer(nnx.Module):
    """A pre-norm transformer layer, or a stack of them."""

    def __init__(self, config: VisionConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        self.norm_1 = LayerNorm(stack, config.hidden_size, config.norm_eps)
        self.attention = VisionAttention(config, stack, rngs)
        self.norm_2 = LayerNorm(stack, config.hidden_size, config.norm_eps)
        self.mlp = VisionMLP(config, stack, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class VisionTower(nnx.Module):
    """Features of pictures: a hidden state of CLIP or SigLIP, its CLS position dropped.

    Args:
      config: sizes and family.
      dtype: of the activations, "float32" or "bfloat16".
      remat: a key of REMAT.
      rngs: stream `params`.
    """

    def __init__(self, config: VisionConfig, dtype: str, remat: str, rngs: nnx.Rngs):
        self.config, self.dtype, self.remat = config, dtype, remat
        width, clip, pixels = config.hidden_size, config.family == "clip", config.patch_size**2 * 3
        projection = weight(rngs, (), (pixels, width), (None, "embed"), pixels**-0.5)
        positions = config.num_features + int(clip)
        self.positions = nnx.Dict(w_td=weight(rngs, (), (positions, width), (None, "embed"), 0.02))
        if clip:
            self.class_embedding_d = weight(rngs, (), (width,), ("embed",), width**-0.5)
            self.patches = nnx.Dict(w_pd=projection)
            self.pre_norm = LayerNorm((), width, config.norm_eps)
        else:
            self.patches = nnx.Dict(w_pd=projection, b_d=constant((), (width,), ("embed",), 0.0))
        self.layers = VisionLayer(config, (config.num_layers,), rngs)
        self.post_norm = LayerNorm((), width, config.norm_eps)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The features of pictures.

        Args:
          images: u8[..., H, W, 3], H = W = image_size.
        Returns:
          f[..., features, D]: the output of layer `num_layers + 1 + feature_layer` (counted from 1), as `hidden_states[feature_layer]` of
          transformers, without the post-norm. Later layers are not run.
        Raises:
          ValueError: if the pictures have another size.
        """
        size = self.config.image_size
        if images.shape[-3:] != (size, size, 3):
            raise ValueError(
                f"images of shape {images.shape}: expected [..., {size}, {size}, 3]; resize them to vision.image_size."
            )
        x = self._embed(images.reshape(-1, size, size, 3))
        count = self.config.num_layers + 1 + self.config.feature_layer
        layer = REMAT[self.remat](VisionLayer.__call__)
        x, _ = jax.lax.scan(
            lambda x, params: (layer(params, x), None),
            x,
            jax.tree.map(lambda w: w[:count], self.layers),
        )
        features = x[:, -self.config.num_features :]
        return features.reshape(*images.shape[:-3], *features.shape[1:])

    def _embed(self, images: jax.Array) -> jax.Array:
        """u8[M,H,W,3] -> f[M,T,D]."""
        config, dtype = self.config, jnp.dtype(self.dtype)
        pixels = (images.astype(jnp.float32) / 255 - jnp.asarray(config.pixel_mean)) / jnp.asarray(
            config.pixel_std
        )
        x = jnp.einsum(
            "mtp,pd->mtd",
            patchify(pixels.astype(dtype), config.patch_size),
            self.patches.w_pd[...].astype(dtype),
        )
        if config.family == "siglip":
            return x + self.patches.b_d[...].astype(dtype) + self.positions.w_td[...].astype(dtype)
        class_d = jnp.broadcast_to(
            self.class_embedding_d[...].astype(dtype), (len(x), 1, config.hidden_size)
        )
        return self.pre_norm(
            jnp.concatenate([class_d, x], axis=1) + self.positions.w_td[...].astype(dtype)
        )


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """f[M,H,W,3] -> f[M,G*G,P], patches row by row; pixels that fill no whole patch are left out, as a strided convolution does."""
    # equivalent to: the im2col of a convolution with kernel = stride = patch
    count, side = len(images), images.shape[1] // patch
    whole = images[:, : side * patch, : side * patch]
    tiles = whole.reshape(count, side, patch, side, patch, 3).swapaxes(2, 3)
    return tiles.reshape(count, side * side, patch * patch * 3)
