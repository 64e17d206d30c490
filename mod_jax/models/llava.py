"""The multimodal model: vision tower -> adaptor -> decoder, and its parameters as one flat dict.

Axes: B rows, S positions, N pictures per row, D width of the decoder, Dv width of the tower,
V vocabulary.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from mod_jax.batch import Array, Batch
from mod_jax.config import ModelConfig, MoEConfig
from mod_jax.models.decoder import Decoder
from mod_jax.models.moe import MoEAux
from mod_jax.models.parameters import constant, multiplied, weight
from mod_jax.models.vision import VisionTower
from mod_jax.ops.linear import add
from mod_jax.sharding import constrain_rows


class Adaptor(nnx.Module):
    """Linear, exact GELU, linear: from the tower's width to the decoder's ("mlp2x_gelu")."""

    def __init__(self, vision_width: int, width: int, rngs: nnx.Rngs):
        self.linear_1 = nnx.Dict(
            w_io=weight(rngs, (), (vision_width, width), ("embed", "mlp"), vision_width**-0.5),
            b_o=constant((), (width,), ("mlp",), 0.0),
        )
        self.linear_2 = nnx.Dict(
            w_io=weight(rngs, (), (width, width), ("mlp", "embed"), width**-0.5),
            b_o=constant((), (width,), (None,), 0.0),
        )

    @jax.named_scope("adaptor")
    def __call__(self, features: jax.Array) -> jax.Array:
        """f[..., Dv] -> f[..., D], same dtype."""
        inner = jax.nn.gelu(_linear(features, self.linear_1), approximate=False)
        return _linear(inner, self.linear_2)


def _linear(x: jax.Array, parameters: nnx.Dict) -> jax.Array:
    return add(multiplied(x, parameters.w_io), parameters.b_o[...])


class Llava(nnx.Module):
    """A student or a teacher.

    Args:
      config: Sizes of all parts.
      rngs: Random number generators with a stream `params`.
      with_tower: False leaves out the vision tower; features then come from another model.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, with_tower: bool = True):
        self.config = config
        if with_tower:
            self.vision_tower = VisionTower(config.vision, config.dtype, config.remat, rngs)
        self.adaptor = Adaptor(config.vision.hidden_size, config.decoder.hidden_size, rngs)
        self.language_model = Decoder(config.decoder, config.dtype, config.remat, rngs)

    def features(self, images: Array) -> jax.Array:
        """Features of the pictures of each row, one picture after the other.

        Args:
          images: u8[B,N,H,W,3]; N may be 0.

        Returns:
          f[B, N * features, Dv].
        """
        rows, pictures = images.shape[:2]
        if pictures == 0:
            return jnp.zeros((rows, 0, self.config.vision.hidden_size), self.config.dtype)
        return self.vision_tower(images).reshape(rows, -1, self.config.vision.hidden_size)

    def embed(self, tokens: Array, picture_index: Array, features: jax.Array) -> jax.Array:
        """Input of the decoder: the embedding of each token, or the adapted feature of a picture.

        Args:
          tokens, picture_index: i32[B,S], as in `Batch`.
          features: f[B, N * features, Dv].

        Returns:
          f[B,S,D].
        """
        embedded = self.language_model.embed(tokens)
        if features.shape[1] == 0:
            return embedded
        adapted = constrain_rows(self.adaptor(features.astype(self.config.dtype)))
        index = jnp.maximum(picture_index, 0)[..., None]
        pictures = jnp.take_along_axis(adapted, index, axis=1, mode="clip")
        return jnp.where(picture_index[..., None] < 0, embedded, pictures)

    def __call__(self, batch: Batch, features: jax.Array | None = None) -> tuple[jax.Array, MoEAux]:
        """Hidden states of a batch.

        Args:
          batch: Packed rows.
          features: From `features`, of this model or of another one with the same tower. None runs
            the tower.

        Returns:
          Hidden states f[B,S,D] after the final norm, and MoEAux stacked over the sparse layers.
        """
        features = self.features(batch.images) if features is None else features
        x = self.embed(batch.tokens, batch.picture_index, features)
        return self.language_model(x, batch.positions, batch.segment_ids, batch.branch_ids)


@functools.lru_cache(maxsize=64)
def _description(
    config: ModelConfig, with_tower: bool = True
) -> tuple[nnx.GraphDef, dict[str, tuple[tuple, nnx.Param]]]:
    """The module without arrays.

    Returns:
      Its structure, and name -> (path in the module, Param of a ShapeDtypeStruct).
    """
    module = nnx.eval_shape(lambda: Llava(config, nnx.Rngs(0), with_tower))
    graph, state = nnx.split(module)
    return graph, {_name(path): (path, param) for path, param in nnx.to_flat_state(state)}


def _name(path: tuple) -> str:
    return ".".join(path)


def abstract(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype of every parameter."""
    return {
        name: jax.ShapeDtypeStruct(param.shape, param.dtype)
        for name, (_, param) in _description(config)[1].items()
    }


def axes(config: ModelConfig) -> dict[str, tuple]:
    """Name -> logical axis (a key of `sharding.RULES`) of each dimension, for every parameter."""
    return {name: param.axes for name, (_, param) in _description(config)[1].items()}


def init(config: ModelConfig, key: jax.Array) -> dict[str, jax.Array]:
    """Fresh parameters, name -> array; jit it with `out_shardings` if they are large."""
    state = nnx.state(Llava(config, nnx.Rngs(key)))
    return {_name(path): param[...] for path, param in nnx.to_flat_state(state)}


def bind(config: ModelConfig, params: Mapping[str, jax.Array], with_tower: bool = True) -> Llava:
    """The module that computes with `params`; cheap, and usable inside a jitted function.

    Args:
      config: Configuration of the model.
      params: Name -> array, exactly the parameters that the module has.
      with_tower: False binds a model without its vision tower, from parameters without it. Such a
        model can only be called with features.

    Raises:
      ValueError: If parameters are missing or unknown; it names them.
    """
    graph, description = _description(config, with_tower)
    if params.keys() != description.keys():
        missing = sorted(description.keys() - params.keys())
        unknown = sorted(params.keys() - description.keys())
        raise ValueError(
            f"parameters do not fit the configuration: missing {missing}, unknown {unknown}."
        )
    flat = [(path, param.replace(params[name])) for name, (path, param) in description.items()]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def head(config: ModelConfig, params: Mapping[str, jax.Array]) -> jax.Array:
    """The output head f32[V,D]; the embedding table if the two are tied."""
    tied = config.decoder.tie_embeddings
    return params["language_model.embedding.w_vd" if tied else "language_model.head.w_vd"]


def count(moe: MoEConfig | None, params: Mapping) -> dict[str, int]:
    """Counts parameters.

    Args:
      moe: Routing of the model's sparse layers; None for a dense model.
      params: Name -> anything with a shape.

    Returns:
      "total": all parameters. "activated": those that take part in computing one token, for which
      K of E experts run.
    """
    sizes = {name: math.prod(x.shape) for name, x in params.items()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".moe.experts." in name)
    idle = experts * (moe.num_experts - moe.experts_per_token) // moe.num_experts if moe else 0
    return {"total": total, "activated": total - idle}
