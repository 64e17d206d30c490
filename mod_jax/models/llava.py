"""The multimodal model: vision tower -> adaptor -> decoder, and its parameters as one flat dict.

Axes: B rows, S positions, N pictures a row, D width of the decoder, Dv of the tower, V vocabulary.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from mod_jax.batch import Batch
from mod_jax.config import ModelConfig, MoEConfig
from mod_jax.models.decoder import Decoder
from mod_jax.models.moe import MoEAux
from mod_jax.models.parameters import constant, weight
from mod_jax.models.vision import VisionTower


class Adaptor(nnx.Module):
    """Linear, exact GELU, Linear: from the tower's width to the decoder's ("mlp2x_gelu")."""

    def __init__(self, vision_width: int, width: int, rngs: nnx.Rngs):
        self.linear_1 = nnx.Dict(
            w_io=weight(rngs, (), (vision_width, width), ("embed", "mlp"), vision_width**-0.5),
            b_o=constant((), (width,), ("mlp",), 0.0),
        )
        self.linear_2 = nnx.Dict(
            w_io=weight(rngs, (), (width, width), ("mlp", "embed"), width**-0.5),
            b_o=constant((), (width,), ("embed",), 0.0),
        )

    def __call__(self, features: jax.Array) -> jax.Array:
        """f[...,Dv] -> f[...,D]."""
        inner = jax.nn.gelu(_linear(features, self.linear_1), approximate=False)
        return _linear(inner, self.linear_2)


def _linear(x: jax.Array, parameters: nnx.Dict) -> jax.Array:
    return jnp.einsum("...i,io->...o", x, parameters.w_io[...].astype(x.dtype)) + parameters.b_o[
        ...
    ].astype(x.dtype)


class Llava(nnx.Module):
    """A student or a teacher."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision_tower = VisionTower(config.vision, config.dtype, config.remat, rngs)
        self.adaptor = Adaptor(config.vision.hidden_size, config.decoder.hidden_size, rngs)
        self.language_model = Decoder(config.decoder, config.dtype, config.remat, rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """Feature rows of the pictures of each row: u8[B,N,H,W,3] -> f[B, N * features, Dv]. N may be 0."""
        rows, pictures = images.shape[:2]
        if pictures == 0:
            return jnp.zeros((rows, 0, self.config.vision.hidden_size), self.config.dtype)
        return self.vision_tower(images).reshape(rows, -1, self.config.vision.hidden_size)

    def embed(self, tokens: jax.Array, picture_index: jax.Array, features: jax.Array) -> jax.Array:
        """What the decoder reads: the token's embedding, or the adapted feature that `picture_index` names.

        Args:
          tokens, picture_index: i32[B,S], as in Batch.
          features: f[B, N * features, Dv].
        Returns:
          f[B,S,D].
        """
        embedded = self.language_model.embed(tokens)
        if features.shape[1] == 0:
            return embedded
        adapted = self.adaptor(features.astype(self.config.dtype))
        pictures = jnp.take_along_axis(
            adapted, jnp.maximum(picture_index, 0)[..., None], axis=1, mode="clip"
        )
        return jnp.where(picture_index[..., None] < 0, embedded, pictures)

    def __call__(self, batch: Batch, features: jax.Array | None = None) -> tuple[jax.Array, MoEAux]:
        """Hidden states of a batch.

        Args:
          batch: packed rows.
          features: from `features`; None runs the tower.
        Returns:
          hidden f[B,S,D] after the final norm, and MoEAux stacked over the sparse layers.
        """
        features = self.features(batch.images) if features is None else features
        x = self.embed(batch.tokens, batch.picture_index, features)
        return self.language_model(x, batch.positions, batch.segment_ids, batch.branch_ids)


@functools.lru_cache(maxsize=64)
def _description(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, tuple[tuple, nnx.Param]]]:
    """The module without arrays: its structure, and name -> (path, Param of a ShapeDtypeStruct)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Llava(config, nnx.Rngs(0))))
    return graph, {".".join(path): (path, param) for path, param in nnx.to_flat_state(state)}


def abstract(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype of every parameter."""
    return {
        name: jax.ShapeDtypeStruct(param.shape, param.dtype)
        for name, (_, param) in _description(config)[1].items()
    }


def axes(config: ModelConfig) -> dict[str, tuple]:
    """Name -> logical axis of each dimension (`sharding.RULES`)."""
    return {name: param.axes for name, (_, param) in _description(config)[1].items()}


def init(config: ModelConfig, key: jax.Array) -> dict[str, jax.Array]:
    """Fresh parameters; to be jitted with out_shardings where they are large."""
    state = nnx.state(Llava(config, nnx.Rngs(key)))
    return {".".join(path): param[...] for path, param in nnx.to_flat_state(state)}


def bind(config: ModelConfig, params: dict[str, jax.Array]) -> Llava:
    """The module that computes with `params`; cheap, inside a jitted function too.

    Raises:
      ValueError: naming the missing and the unknown parameters.
    """
    graph, description = _description(config)
    if params.keys() != description.keys():
        missing, unknown = (
            sorted(description.keys() - params.keys()),
            sorted(params.keys() - description.keys()),
        )
        raise ValueError(
            f"parameters do not fit the configuration: missing {missing}, unknown {unknown}."
        )
    return nnx.merge(
        graph,
        nnx.from_flat_state(
            [(path, param.replace(params[name])) for name, (path, param) in description.items()]
        ),
    )


def head(config: ModelConfig, params: dict[str, jax.Array]) -> jax.Array:
    """The output head f32[V,D] (the embedding table where they are tied)."""
    tied = config.decoder.tie_embeddings
    return params["language_model.embedding.w_vd" if tied else "language_model.head.w_vd"]


def count(moe: MoEConfig | None, params: Mapping) -> dict[str, int]:
    """All numbers in the parameters, and those that take part in one token: of E experts, K."""
    sizes = {name: math.prod(x.shape) for name, x in params.items()}
    experts, total = (
        sum(size for name, size in sizes.items() if ".moe.experts." in name),
        sum(sizes.values()),
    )
    return {
        "total": total,
        "activated": total
        - (experts * (moe.num_experts - moe.experts_per_token) // moe.num_experts if moe else 0),
    }
