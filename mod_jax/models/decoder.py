"""The language model: one decoder for the Qwen, Llama and Qwen3 families, dense or with mixture-of-experts layers.

Axes: B rows, S positions, C places of a cache, D width, N heads, K key/value heads, H head size, V vocabulary, L layers (Lm sparse), E experts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mod_jax.config import DecoderConfig
from mod_jax.models.feed_forward import FeedForward
from mod_jax.models.moe import MoE, MoEAux
from mod_jax.models.parameters import constant, weight
from mod_jax.models.remat import REMAT
from mod_jax.ops.attention import attention, visible
from mod_jax.sharding import constrain_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the positions so far; all rows grow together, so prompts are padded on the left (segment 0).

    Attributes:
      keys, values: f[L,B,C,K,H].
      segment_ids, branch_ids: i32[B,C]; segment 0 where nothing is written yet.
      index: i32[], the next free place.
    """

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array
    branch_ids: jax.Array
    index: jax.Array


class RMSNorm(nnx.Module):
    """RMS norm over the last dimension; statistics and scaling in float32."""

    def __init__(
        self,
        stack: tuple[int, ...],
        size: int,
        eps: float,
        leaf: str = "scale_d",
        axis: str | None = "embed",
    ):
        self.eps, self.leaf = eps, leaf
        setattr(self, leaf, constant(stack, (size,), (axis,), 1.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (normed * getattr(self, self.leaf)[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Projections of grouped-query attention with rotary positions; the attention itself is `ops.attention`."""

    def __init__(self, config: DecoderConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.query = nnx.Dict(
            w_dnh=weight(rngs, stack, (D, N, H), ("embed", "heads", None), D**-0.5)
        )
        self.key = nnx.Dict(
            w_dkh=weight(rngs, stack, (D, K, H), ("embed", "kv_heads", None), D**-0.5)
        )
        self.value = nnx.Dict(
            w_dkh=weight(rngs, stack, (D, K, H), ("embed", "kv_heads", None), D**-0.5)
        )
        self.out = nnx.Dict(
            w_nhd=weight(rngs, stack, (N, H, D), ("heads", None, "embed"), (N * H) ** -0.5)
        )
        self.bias, self.qk_norm = config.qkv_bias, config.qk_norm
        if self.bias:
            self.query.b_nh = constant(stack, (N, H), ("heads", None), 0.0)
            self.key.b_kh = constant(stack, (K, H), ("kv_heads", None), 0.0)
            self.value.b_kh = constant(stack, (K, H), ("kv_heads", None), 0.0)
        if self.qk_norm:
            self.query_norm = RMSNorm(stack, H, config.norm_eps, "scale_h", None)
            self.key_norm = RMSNorm(stack, H, config.norm_eps, "scale_h", None)

    def project(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """f[B,S,D], rotary angles -> query f[B,S,N,H], key and value f[B,S,K,H]."""
        query = jnp.einsum("bsd,dnh->bsnh", x, self.query.w_dnh[...].astype(x.dtype))
        key = jnp.einsum("bsd,dkh->bskh", x, self.key.w_dkh[...].astype(x.dtype))
        value = jnp.einsum("bsd,dkh->bskh", x, self.value.w_dkh[...].astype(x.dtype))
        if self.bias:
            query += self.query.b_nh[...].astype(x.dtype)
            key += self.key.b_kh[...].astype(x.dtype)
            value += self.value.b_kh[...].astype(x.dtype)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, angles), rotate(key, angles), value

    def merge(self, heads: jax.Array) -> jax.Array:
        """f[B,S,N,H] -> f[B,S,D]."""
        return jnp.einsum("bsnh,nhd->bsd", heads, self.out.w_nhd[...].astype(heads.dtype))


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """positions i32[B,S] -> cosines and sines f32[B,S,1,H/2]; pair i turns by position / theta^(2i/H)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (i, i + H/2) of x f[B,S,N,H] (transformers' rotate-half convention), in float32."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


class Layers(nnx.Module):
    """All layers: one stack of attentions and norms [L], one of dense [Ld] and one of sparse [Lm] feed-forwards."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        layers, sparse = config.num_layers, len(config.sparse_layers)
        self.attention_norm = RMSNorm((layers,), config.hidden_size, config.norm_eps)
        self.attention = Attention(config, (layers,), rngs)
        self.mlp_norm = RMSNorm((layers,), config.hidden_size, config.norm_eps)
        if sparse < layers:
            self.mlp = FeedForward(config, (layers - sparse,), rngs)
        if sparse:
            self.moe = MoE(config, (sparse,), rngs)

    def blocks(self, first: dict[str, int], pattern: tuple[str, ...], repeats: int) -> dict:
        """The stacks from the numbers in `first` (of a layer, of an FFN of its kind) on, as [repeats, layers of a block, ...]."""

        def block(name: str, period: int, stack):
            start, stop = first[name], first[name] + repeats * period
            return jax.tree.map(
                lambda w: w[start:stop].reshape(repeats, period, *w.shape[1:]), stack
            )

        common = {
            "attention_norm": self.attention_norm,
            "attention": self.attention,
            "mlp_norm": self.mlp_norm,
        }
        kinds = {
            kind: block(kind, pattern.count(kind), getattr(self, kind)) for kind in set(pattern)
        }
        return {"layer": block("layer", len(pattern), common), **kinds}


def segments(kinds: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    """Cuts the layers' kinds into (pattern, repeats), greedily: the period (1 or 2) that covers more layers, 1 where they tie.

    Dense: one segment. Every second layer sparse: one segment of (moe, mlp). First half sparse: two segments.
    """
    found, start = [], 0
    while start < len(kinds):
        options = []
        for pattern in (kinds[start : start + 1], kinds[start : start + 2]):
            repeats = 1
            while kinds[start + repeats * len(pattern) :][: len(pattern)] == pattern:
                repeats += 1
            options.append((pattern, repeats))
        found.append(max(options, key=lambda option: len(option[0]) * option[1]))
        start += len(found[-1][0]) * found[-1][1]
    return found


class Decoder(nnx.Module):
    """Hidden states from embeddings; logits are left to whoever applies the head.

    Args:
      config: sizes.
      dtype: of the activations, "float32" or "bfloat16".
      remat: a key of REMAT.
      rngs: stream `params`.
    """

    def __init__(self, config: DecoderConfig, dtype: str, remat: str, rngs: nnx.Rngs):
        self.config, self.dtype, self.remat = config, dtype, remat
        table = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Dict(
            w_vd=weight(rngs, (), table, ("vocab", "embed"), config.hidden_size**-0.5)
        )
        self.layers = Layers(config, rngs)
        self.norm = RMSNorm((), config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nnx.Dict(
                w_vd=weight(rngs, (), table, ("vocab", "embed"), config.hidden_size**-0.5)
            )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """i32[B,S] -> f[B,S,D]."""
        return jnp.take(self.embedding.w_vd[...], tokens, axis=0, mode="clip").astype(self.dtype)

    def head_w_vd(self) -> jax.Array:
        """The head f32[V,D]; the embedding table where they are tied."""
        return (self.embedding if self.config.tie_embeddings else self.head).w_vd[...]

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache of `capacity` positions a row."""
        config = self.config
        stack, ids = (
            (config.num_layers, rows, capacity, config.num_kv_heads, config.head_dim),
            (rows, capacity),
        )
        keys, values = (
            jnp.zeros(stack, self.dtype),
            jnp.zeros(stack, self.dtype),
        )  # two buffers, so that a cache can be donated
        return Cache(
            keys,
            values,
            jnp.zeros(ids, jnp.int32),
            jnp.zeros(ids, jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        branch_ids: jax.Array,
        cache: Cache | None = None,
    ):
        """Runs the layers.

        Args:
          x: f[B,S,D], embeddings.
          positions, segment_ids, branch_ids: i32[B,S], as in Batch.
          cache: the S positions are appended to it at `index`, in all rows alike, and see what lies before them. `index + S` must stay within
            its capacity: the index is known on the device only, and a write beyond the end would overwrite the last places.
        Returns:
          (hidden, aux), with a cache (hidden, aux, cache). hidden: f[B,S,D] after the final norm. aux: MoEAux of the sparse layers in order,
          balance and z f32[Lm], load f32[Lm,E]; Lm = 0 (and E = 0) for a dense decoder.
        """
        x = constrain_rows(x.astype(self.dtype))
        state, mask = None, visible(segment_ids, branch_ids)
        if cache is not None:
            place = (0, cache.index)
            segments_so_far = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, place)
            branches_so_far = jax.lax.dynamic_update_slice(cache.branch_ids, branch_ids, place)
            mask = visible(segment_ids, branch_ids, segments_so_far, branches_so_far, cache.index)
            state = (cache.keys, cache.values)
        context = {
            "angles": rotary_angles(positions, self.config.head_dim, self.config.rope_theta),
            "mask": mask,
            "valid": segment_ids > 0,
            "index": None if cache is None else cache.index,
        }
        x, state, aux = self._run_layers(x, state, context)
        hidden = self.norm(x)
        if cache is None:
            return hidden, aux
        return (
            hidden,
            aux,
            Cache(*state, segments_so_far, branches_so_far, cache.index + x.shape[1]),
        )

    def _run_layers(self, x, state, context):
        """Scans the blocks of every segment; state: (keys, values) of a cache or None."""
        kinds = tuple(
            "moe" if n in self.config.sparse_layers else "mlp"
            for n in range(self.config.num_layers)
        )
        first, found = {"layer": 0, "mlp": 0, "moe": 0}, []
        for pattern, repeats in segments(kinds):
            numbers = first["layer"] + jnp.arange(repeats * len(pattern)).reshape(
                repeats, len(pattern)
            )
            blocks = self.layers.blocks(first, pattern, repeats)
            body = functools.partial(run_block, pattern, REMAT[self.remat], context)
            (x, state), aux = jax.lax.scan(body, (x, state), (numbers, blocks))
            found += [] if aux is None else [aux]
            first = {
                name: n + repeats * (len(pattern) if name == "layer" else pattern.count(name))
                for name, n in first.items()
            }
        if not found:
            return x, state, MoEAux(jnp.zeros((0,)), jnp.zeros((0,)), jnp.zeros((0, 0)))
        flat = [jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux) for aux in found]
        return x, state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *flat)


def run_block(pattern: tuple[str, ...], remat, context: dict, carry, block):
    """Body of the scan: the layers of one block, one after the other; MoEAux of its sparse layers stacked, None without any."""
    (x, state), (numbers, params), found = carry, block, []
    for place, kind in enumerate(pattern):
        layer = remat(functools.partial(run_layer, kind, place, pattern[:place].count(kind)))
        x, state, aux = layer(x, state, numbers[place], params, context)
        found += [] if aux is None else [aux]
    return (x, state), jax.tree.map(lambda *auxes: jnp.stack(auxes), *found) if found else None


def run_layer(kind: str, place: int, nth: int, x, state, number, params, context):
    """Layer `place` of a block, the `nth` of its kind there. It slices the block itself: what remat keeps is then the block, not copies."""
    common, ffn = (
        jax.tree.map(lambda w: w[place], params["layer"]),
        jax.tree.map(lambda w: w[nth], params[kind]),
    )
    query, key, value = common["attention"].project(common["attention_norm"](x), context["angles"])
    if state is not None:
        at = (number, 0, context["index"], 0, 0)
        state = tuple(
            jax.lax.dynamic_update_slice(stack, new[None], at)
            for stack, new in zip(state, (key, value))
        )
        key, value = (stack[number] for stack in state)
    x = constrain_rows(x + common["attention"].merge(attention(query, key, value, context["mask"])))
    y, aux = (
        ffn(common["mlp_norm"](x), context["valid"])
        if kind == "moe"
        else (ffn(common["mlp_norm"](x)), None)
    )
    return constrain_rows(x + y), state, aux
