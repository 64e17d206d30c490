"""The language model: one decoder for the Qwen, Llama and Qwen3 families, dense or with MoE layers.

Axes: B rows, S positions, C capacity of a cache, D width, N heads, K key/value heads, H head size,
V vocabulary, L layers (Ld dense, Lm sparse), E experts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mod_jax.batch import Array
from mod_jax.config import DecoderConfig
from mod_jax.models.feed_forward import FeedForward
from mod_jax.models.moe import MoE, MoEAux
from mod_jax.models.parameters import constant, multiplied, weight
from mod_jax.models.remat import rematerialised
from mod_jax.ops.attention import attention, attention_to
from mod_jax.ops.embedding import TABLE_AXES, lookup
from mod_jax.ops.linear import add
from mod_jax.ops.visibility import visible
from mod_jax.sharding import constrain_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the positions so far.

    All rows grow together, so prompts of different lengths are padded on the left (with segment 0).

    Attributes:
      keys, values: f[L,B,C,K,H].
      segment_ids, branch_ids: i32[B,C]; segment 0 where nothing has been written yet.
      index: i32[], the next free position.
    """

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array
    branch_ids: jax.Array
    index: jax.Array


class RMSNorm(nnx.Module):
    """RMS norm over the last dimension, or a stack of them; statistics and scaling in float32.

    Args:
      stack: Leading dimensions of the scale, as in `parameters.weight`.
      size: Size of the last dimension.
      eps: Added to the mean square.
      leaf: Name of the scale parameter.
    """

    def __init__(
        self,
        stack: tuple[int, ...],
        size: int,
        eps: float,
        leaf: str = "scale_d",
    ):
        self.eps = eps
        self.leaf = leaf
        setattr(self, leaf, constant(stack, (size,), (None,), 1.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        """f[..., size] -> f[..., size], same dtype."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (normed * getattr(self, self.leaf)[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Projections of grouped-query attention with rotary positions; one layer or a stack of them.

    The attention itself is `ops.attention`.
    """

    def __init__(self, config: DecoderConfig, stack: tuple[int, ...], rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        kv_axes = ("embed", "kv_heads", None)
        out_axes = ("heads", None, "embed")
        self.query = nnx.Dict(
            w_dnh=weight(rngs, stack, (D, N, H), ("embed", "heads", None), D**-0.5)
        )
        self.key = nnx.Dict(w_dkh=weight(rngs, stack, (D, K, H), kv_axes, D**-0.5))
        self.value = nnx.Dict(w_dkh=weight(rngs, stack, (D, K, H), kv_axes, D**-0.5))
        self.out = nnx.Dict(w_nhd=weight(rngs, stack, (N, H, D), out_axes, (N * H) ** -0.5))
        self.bias = config.qkv_bias
        self.qk_norm = config.qk_norm
        if self.bias:
            self.query.b_nh = constant(stack, (N, H), ("heads", None), 0.0)
            self.key.b_kh = constant(stack, (K, H), ("kv_heads", None), 0.0)
            self.value.b_kh = constant(stack, (K, H), ("kv_heads", None), 0.0)
        if self.qk_norm:
            self.query_norm = RMSNorm(stack, H, config.norm_eps, "scale_h")
            self.key_norm = RMSNorm(stack, H, config.norm_eps, "scale_h")

    def project(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Makes queries, keys and values, with rotary positions applied.

        Args:
          x: f[B,S,D].
          angles: From `rotary_angles`.

        Returns:
          query f[B,S,N,H], key f[B,S,K,H], value f[B,S,K,H].
        """
        query = multiplied(x, self.query.w_dnh)
        key = multiplied(x, self.key.w_dkh)
        value = multiplied(x, self.value.w_dkh)
        if self.bias:
            query = add(query, self.query.b_nh[...])
            key = add(key, self.key.b_kh[...])
            value = add(value, self.value.b_kh[...])
        if self.qk_norm:
            query = self.query_norm(query)
            key = self.key_norm(key)
        return rotate(query, angles), rotate(key, angles), value

    def merge(self, heads: jax.Array) -> jax.Array:
        """Applies the output projection to the attended heads: f[B,S,N,H] -> f[B,S,D]."""
        return multiplied(heads, self.out.w_nhd, inputs=2)


def rotary_angles(positions: Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles: pair i turns by position / theta^(2i/H).

    Args:
      positions: i32[B,S].
      head_dim: H.
      theta: Base of the frequencies.

    Returns:
      (cosines, sines), each f32[B,S,1,H/2].
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of each head (the rotate-half convention of transformers).

    Args:
      x: f[B,S,N,H].
      angles: From `rotary_angles`.

    Returns:
      f[B,S,N,H] in the dtype of `x`; the rotation is computed in float32.
    """
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Layers(nnx.Module):
    """All layers, stacked by kind.

    One stack of attentions and norms [L], one of dense [Ld] and one of sparse [Lm] feed-forward
    layers; a stack without layers is left out.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        layers = config.num_layers
        sparse = len(config.sparse_layers)
        self.attention_norm = RMSNorm((layers,), config.hidden_size, config.norm_eps)
        self.attention = Attention(config, (layers,), rngs)
        self.mlp_norm = RMSNorm((layers,), config.hidden_size, config.norm_eps)
        if sparse < layers:
            self.mlp = FeedForward(config, (layers - sparse,), rngs)
        if sparse:
            self.moe = MoE(config, (sparse,), rngs)

    def blocks(self, first: dict[str, int], pattern: tuple[str, ...], repeats: int) -> dict:
        """Parameters of `repeats` consecutive blocks of layers, for a scan over the blocks.

        Args:
          first: Where the blocks start in each stack: of "layer" (attention and norms), "mlp" and
            "moe".
          pattern: Kind ("mlp" or "moe") of each layer of a block.
          repeats: Number of blocks.

        Returns:
          "layer", and each kind in `pattern` -> modules whose leaves are
          [repeats, layers of that stack in a block, ...].
        """

        def block(name: str, period: int, stack):
            start = first[name]
            stop = start + repeats * period
            return jax.tree.map(
                lambda w: w[start:stop].reshape(repeats, period, *w.shape[1:]), stack
            )

        common = {
            "attention_norm": self.attention_norm,
            "attention": self.attention,
            "mlp_norm": self.mlp_norm,
        }
        feed_forward = {
            kind: block(kind, pattern.count(kind), getattr(self, kind))
            for kind in sorted(set(pattern))  # the same order of operations in every process
        }
        return {"layer": block("layer", len(pattern), common), **feed_forward}


def segments(kinds: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    """Cuts the kinds of all layers into (pattern, repeats), so that few scans run all layers.

    Greedy: each segment has the pattern of length 1 or 2 whose repetition covers more layers, and
    length 1 if both cover equally many. A dense decoder is one segment; so is a decoder with every
    second layer sparse, of the pattern (moe, mlp). One whose first half is sparse has two segments.
    """
    found: list[tuple[tuple[str, ...], int]] = []
    start = 0
    while start < len(kinds):
        options = []
        for pattern in (kinds[start : start + 1], kinds[start : start + 2]):
            repeats = 1
            while kinds[start + repeats * len(pattern) :][: len(pattern)] == pattern:
                repeats += 1
            options.append((pattern, repeats))
        pattern, repeats = max(options, key=lambda option: len(option[0]) * option[1])
        found.append((pattern, repeats))
        start += len(pattern) * repeats
    return found


class Decoder(nnx.Module):
    """Hidden states from embeddings. Applying the output head is left to the caller.

    Args:
      config: Sizes.
      dtype: Dtype of the activations, "float32" or "bfloat16".
      remat: As in `ModelConfig`.
      rngs: Random number generators with a stream `params`.
    """

    def __init__(self, config: DecoderConfig, dtype: str, remat: str, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        self.remat = remat
        table = (config.vocab_size, config.hidden_size)
        stddev = config.hidden_size**-0.5
        self.embedding = nnx.Dict(w_vd=weight(rngs, (), table, TABLE_AXES, stddev))
        self.layers = Layers(config, rngs)
        self.norm = RMSNorm((), config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nnx.Dict(w_vd=weight(rngs, (), table, TABLE_AXES, stddev))

    @jax.named_scope("embedding")
    def embed(self, tokens: Array) -> jax.Array:
        """Looks up the embeddings of tokens: i32[B,S] -> f[B,S,D]."""
        return lookup(self.embedding.w_vd[...], tokens, self.dtype)

    def _new_cache(self, rows: int, capacity: int) -> Cache:
        config = self.config
        stack = (config.num_layers, rows, capacity, config.num_kv_heads, config.head_dim)
        ids = (rows, capacity)
        return Cache(
            keys=jnp.zeros(stack, self.dtype),  # each field a buffer of its own: caches are donated
            values=jnp.zeros(stack, self.dtype),
            segment_ids=jnp.zeros(ids, jnp.int32),
            branch_ids=jnp.zeros(ids, jnp.int32),
            index=jnp.zeros((), jnp.int32),
        )

    def __call__(
        self,
        x: jax.Array,
        positions: Array,
        segment_ids: Array,
        branch_ids: Array,
        cache: Cache | int | None = None,
    ):
        """Runs the layers.

        Args:
          x: f[B,S,D], embeddings.
          positions, segment_ids, branch_ids: i32[B,S], as in `Batch`.
          cache: If given, the S positions are appended to it at `index`, the same in all rows, and
            attend to what it holds. `index + S` must not exceed its capacity: a larger write would
            overwrite the last positions, and cannot be checked here because the index is only known
            on the device. A number begins a cache of that capacity, at least S: the positions
            attend among themselves, without an array of all scores.

        Returns:
          (hidden, aux), or with a cache (hidden, aux, cache).
          hidden: f[B,S,D] after the final norm.
          aux: MoEAux of the sparse layers in order, balance and z f32[Lm] and load f32[Lm,E];
            Lm = 0 and E = 0 for a dense decoder.
        """
        x = constrain_rows(x.astype(self.dtype))
        state, mask = None, None
        continues = isinstance(cache, Cache)
        if isinstance(cache, int):
            cache = self._new_cache(x.shape[0], cache)
        if cache is not None:
            start = (0, cache.index)
            segments_so_far = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, start)
            branches_so_far = jax.lax.dynamic_update_slice(cache.branch_ids, branch_ids, start)
            if continues:
                ids = (segment_ids, branch_ids, segments_so_far, branches_so_far)
                mask = visible(*ids, cache.index)
            state = (cache.keys, cache.values)
        context = {
            "angles": rotary_angles(positions, self.config.head_dim, self.config.rope_theta),
            "rows": (segment_ids, branch_ids),
            "mask": mask,
            "valid": segment_ids > 0,
            "index": None if cache is None else cache.index,
        }
        x, state, aux = self._run_layers(x, state, context)
        with jax.named_scope("final_norm"):
            hidden = self.norm(x)
        if cache is None:
            return hidden, aux
        keys, values = state
        index = cache.index + x.shape[1]
        return hidden, aux, Cache(keys, values, segments_so_far, branches_so_far, index)

    def _run_layers(self, x: jax.Array, state: tuple | None, context: dict):
        """Runs all layers, one scan over blocks for each of the `segments`.

        Args:
          x: f[B,S,D].
          state: (keys, values) of a cache, or None.
          context: Arguments that all layers share: angles, rows (segments and branches), mask of
            what an earlier cache holds (None attends by rows), valid, index.

        Returns:
          (x, state, MoEAux of all sparse layers).
        """
        kinds = tuple(
            "moe" if number in self.config.sparse_layers else "mlp"
            for number in range(self.config.num_layers)
        )
        first = {"layer": 0, "mlp": 0, "moe": 0}
        auxes = []
        for pattern, repeats in segments(kinds):
            period = len(pattern)
            numbers = first["layer"] + jnp.arange(repeats * period).reshape(repeats, period)
            blocks = self.layers.blocks(first, pattern, repeats)
            body = functools.partial(run_block, pattern, self.remat, context)
            (x, state), aux = jax.lax.scan(body, (x, state), (numbers, blocks))
            if aux is not None:
                auxes.append(aux)
            first = {
                "layer": first["layer"] + repeats * period,
                "mlp": first["mlp"] + repeats * pattern.count("mlp"),
                "moe": first["moe"] + repeats * pattern.count("moe"),
            }
        if not auxes:
            return x, state, MoEAux(jnp.zeros((0,)), jnp.zeros((0,)), jnp.zeros((0, 0)))
        # from [blocks, sparse layers of a block, ...] to [sparse layers, ...]
        flat = [jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux) for aux in auxes]
        return x, state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *flat)


def run_block(pattern: tuple[str, ...], remat: str, context: dict, carry, block):
    """Runs the layers of one block, one after the other: the body of the scan over blocks.

    Args:
      pattern: Kind ("mlp" or "moe") of each layer.
      remat: As in `ModelConfig`, for each layer.
      context: Arguments that all layers share.
      carry: (x, state), as in `Decoder._run_layers`.
      block: (numbers, params): i32[layers of the block] their numbers among all layers, and their
        parameters from `Layers.blocks`.

    Returns:
      (carry, MoEAux of the block's sparse layers, stacked; None if it has none).
    """
    x, state = carry
    numbers, params = block
    auxes = []
    for place, kind in enumerate(pattern):
        nth = pattern[:place].count(kind)
        layer = rematerialised(remat, functools.partial(run_layer, kind, place, nth))
        x, state, aux = layer(x, state, numbers[place], params, context)
        if aux is not None:
            auxes.append(aux)
    if not auxes:
        return (x, state), None
    return (x, state), jax.tree.map(lambda *values: jnp.stack(values), *auxes)


def run_layer(kind: str, place: int, nth: int, x, state, number, params: dict, context: dict):
    """Runs one layer of a block.

    Args:
      kind: Its feed-forward layer, "mlp" or "moe".
      place: Its place among the layers of the block.
      nth: Its place among the block's layers of the same kind.
      x: f[B,S,D].
      state: (keys, values) of a cache, or None.
      number: i32[], its number among all layers: where its keys and values lie in the cache.
      params: Parameters of the whole block, from `Layers.blocks`.
      context: Arguments that all layers share.

    Returns:
      (x, state, MoEAux of a sparse layer or None).
    """
    with jax.named_scope("sparse_layer" if kind == "moe" else "dense_layer"):
        # Slice inside remat, so that it saves the stacked block instead of per-layer copies.
        common = jax.tree.map(lambda w: w[place], params["layer"])
        feed_forward = jax.tree.map(lambda w: w[nth], params[kind])
        with jax.named_scope("attention"):
            normed = common["attention_norm"](x)
            query, key, value = common["attention"].project(normed, context["angles"])
            if state is not None:
                start = (number, 0, context["index"], 0, 0)
                state = tuple(
                    jax.lax.dynamic_update_slice(stack, new[None], start)
                    for stack, new in zip(state, (key, value))
                )
            if context["mask"] is None:
                attended = attention(query, key, value, *context["rows"])
            else:
                key, value = (stack[number] for stack in state)
                attended = attention_to(query, key, value, context["mask"])
            x = constrain_rows(x + common["attention"].merge(attended))
        with jax.named_scope(kind):
            normed = common["mlp_norm"](x)
            if kind == "moe":
                y, aux = feed_forward(normed, context["valid"])
            else:
                y, aux = feed_forward(normed), None
            x = constrain_rows(x + y)
    return x, state, aux
