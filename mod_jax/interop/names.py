"""Our parameters and Hugging Face's: one table a part, read in both directions.

A row of a table is (our name, their name, their dimensions): our dimensions are the letters our name ends in, and a
group of letters is one flattened dimension, so a Linear [out, in] is "nh d" where ours is `w_dnh`. Their names are those
that transformers 4.x writes (5.x and vLLM read them too); other spellings are brought to them by `canonical`.

Letters: d width, n heads, k key/value heads, h head size, f feed-forward, v vocabulary, e experts, t positions of the tower,
i o in and out of the adaptor, y x c row, column and channel of a patch (together p), a stack of layers or experts goes first.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from mod_jax.config import ConfigError, DecoderConfig, ModelConfig, VisionConfig
from mod_jax.interop.folder import DTYPES

VISION = (
    ("patches.w_pd", "embeddings.patch_embedding.weight", "d c y x"),
    ("positions.w_td", "embeddings.position_embedding.weight", "t d"),
    ("post_norm.scale_d", "post_layernorm.weight", "d"),
    ("post_norm.bias_d", "post_layernorm.bias", "d"),
)
VISION_FAMILY = {
    "clip": (
        ("class_embedding_d", "embeddings.class_embedding", "d"),
        ("pre_norm.scale_d", "pre_layrnorm.weight", "d"),  # their spelling
        ("pre_norm.bias_d", "pre_layrnorm.bias", "d"),
    ),
    "siglip": (("patches.b_d", "embeddings.patch_embedding.bias", "d"),),
}
VISION_LAYER = (
    ("norm_1.scale_d", "layer_norm1.weight", "d"),
    ("norm_1.bias_d", "layer_norm1.bias", "d"),
    ("norm_2.scale_d", "layer_norm2.weight", "d"),
    ("norm_2.bias_d", "layer_norm2.bias", "d"),
    ("attention.query.w_dnh", "self_attn.q_proj.weight", "nh d"),
    ("attention.query.b_nh", "self_attn.q_proj.bias", "nh"),
    ("attention.key.w_dnh", "self_attn.k_proj.weight", "nh d"),
    ("attention.key.b_nh", "self_attn.k_proj.bias", "nh"),
    ("attention.value.w_dnh", "self_attn.v_proj.weight", "nh d"),
    ("attention.value.b_nh", "self_attn.v_proj.bias", "nh"),
    ("attention.out.w_nhd", "self_attn.out_proj.weight", "d nh"),
    ("attention.out.b_d", "self_attn.out_proj.bias", "d"),
    ("mlp.up.w_df", "mlp.fc1.weight", "f d"),
    ("mlp.up.b_f", "mlp.fc1.bias", "f"),
    ("mlp.down.w_fd", "mlp.fc2.weight", "d f"),
    ("mlp.down.b_d", "mlp.fc2.bias", "d"),
)
ADAPTOR_LINEAR = (("w_io", "weight", "o i"), ("b_o", "bias", "o"))
DECODER = (
    ("embedding.w_vd", "model.embed_tokens.weight", "v d"),
    ("norm.scale_d", "model.norm.weight", "d"),
)
HEAD = (("head.w_vd", "lm_head.weight", "v d"),)
DECODER_LAYER = (
    ("attention_norm.scale_d", "input_layernorm.weight", "d"),
    ("mlp_norm.scale_d", "post_attention_layernorm.weight", "d"),
    ("attention.query.w_dnh", "self_attn.q_proj.weight", "nh d"),
    ("attention.key.w_dkh", "self_attn.k_proj.weight", "kh d"),
    ("attention.value.w_dkh", "self_attn.v_proj.weight", "kh d"),
    ("attention.out.w_nhd", "self_attn.o_proj.weight", "d nh"),
)
QKV_BIAS = (
    ("attention.query.b_nh", "self_attn.q_proj.bias", "nh"),
    ("attention.key.b_kh", "self_attn.k_proj.bias", "kh"),
    ("attention.value.b_kh", "self_attn.v_proj.bias", "kh"),
)
QK_NORM = (
    ("attention.query_norm.scale_h", "self_attn.q_norm.weight", "h"),
    ("attention.key_norm.scale_h", "self_attn.k_norm.weight", "h"),
)
DENSE = (
    ("mlp.gate.w_df", "mlp.gate_proj.weight", "f d"),
    ("mlp.up.w_df", "mlp.up_proj.weight", "f d"),
    ("mlp.down.w_fd", "mlp.down_proj.weight", "d f"),
)
ROUTER = (("moe.router.w_de", "mlp.gate.weight", "e d"),)
EXPERTS = (
    ("moe.experts.gate.w_edf", "mlp.experts.{expert}.gate_proj.weight", "f d"),
    ("moe.experts.up.w_edf", "mlp.experts.{expert}.up_proj.weight", "f d"),
    ("moe.experts.down.w_efd", "mlp.experts.{expert}.down_proj.weight", "d f"),
)
RESIDUAL = (  # DeepSpeed's names: no model of transformers has such a layer
    ("moe.residual.gate.w_df", "mlp.mlp.gate_proj.weight", "f d"),
    ("moe.residual.up.w_df", "mlp.mlp.up_proj.weight", "f d"),
    ("moe.residual.down.w_fd", "mlp.mlp.down_proj.weight", "d f"),
    ("moe.residual.mix.w_d2", "mlp.coefficient.weight", "2 d"),  # of (experts, shared expert)
    ("moe.residual.mix.b_2", "mlp.coefficient.bias", "2"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the tensors of theirs that it consists of.

    Attributes:
      ours, theirs: the names; theirs is a template over {layer} and {expert}.
      our_dims, their_dims: letters of the dimensions, without our stacks.
      sizes: size of each letter.
      layers: numbers of the stacked layers, ascending; empty for an unstacked parameter.
      experts: stacked experts of a layer; 0 for none.
    """

    ours: str
    theirs: str
    our_dims: str
    their_dims: str
    sizes: Mapping[str, int]
    layers: tuple[int, ...] = ()
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our parameter, stacks included."""
        return tuple(n for n in (len(self.layers), self.experts) if n) + _shape(
            self.our_dims, self.sizes
        )

    @property
    def their_shape(self) -> tuple[int, ...]:
        return _shape(self.their_dims, self.sizes)

    def places(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index into our stacks, their name) of each of their tensors."""
        stacks = {"layer": self.layers, "expert": range(self.experts)}
        stacks = {key: numbers for key, numbers in stacks.items() if numbers}
        for place in itertools.product(*(enumerate(numbers) for numbers in stacks.values())):
            yield (
                tuple(i for i, _ in place),
                self.theirs.format(**{key: number for key, (_, number) in zip(stacks, place)}),
            )

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return _rearrange(array, self.their_dims, self.our_dims, self.sizes)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        return _rearrange(array, self.our_dims, self.their_dims, self.sizes)


def _shape(dims: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in group) for group in dims.split())


def _rearrange(array: np.ndarray, source: str, target: str, sizes: Mapping[str, int]) -> np.ndarray:
    letters = source.replace(" ", "")
    order = [letters.index(letter) for letter in target.replace(" ", "")]
    return (
        array.reshape([sizes[letter] for letter in letters])
        .transpose(order)
        .reshape(_shape(target, sizes))
    )


def _entries(table, ours: str, theirs: str, sizes, layers=(), experts=0) -> list[Entry]:
    made = []
    for our_name, their_name, their_dims in table:
        letters = our_name.rpartition("_")[2]
        our_dims = " ".join(
            "yxc" if letter == "p" else letter
            for letter in (letters.replace("e", "") if experts else letters)
        )
        made.append(
            Entry(
                ours + our_name,
                theirs + their_name,
                our_dims,
                their_dims,
                sizes,
                tuple(layers),
                experts,
            )
        )
    return made


def vision_entries(config: VisionConfig, prefix: str = "") -> list[Entry]:
    """All parameters of a tower; `prefix` goes before their names."""
    heads, ours, theirs = config.num_heads, "vision_tower.", prefix + "vision_model."
    positions = config.num_features + (config.family == "clip")
    sizes = {
        "d": config.hidden_size,
        "n": heads,
        "h": config.hidden_size // heads,
        "f": config.intermediate_size,
    }
    sizes |= {"y": config.patch_size, "x": config.patch_size, "c": 3, "t": positions}
    return [
        *_entries(VISION + VISION_FAMILY[config.family], ours, theirs, sizes),
        *_entries(
            VISION_LAYER,
            ours + "layers.",
            theirs + "encoder.layers.{layer}.",
            sizes,
            range(config.num_layers),
        ),
    ]


def decoder_entries(config: DecoderConfig, prefix: str = "") -> list[Entry]:
    """All parameters of a language model and its head; `prefix` goes before their names."""
    ours, theirs, layer = "language_model.", prefix, prefix + "model.layers.{layer}."
    sizes = {
        "d": config.hidden_size,
        "n": config.num_heads,
        "k": config.num_kv_heads,
        "h": config.head_dim,
    }
    sizes |= {
        "f": config.intermediate_size,
        "v": config.vocab_size,
        "e": config.moe.num_experts if config.moe else 0,
    }
    sparse, every = config.sparse_layers, range(config.num_layers)
    dense = [number for number in every if number not in sparse]
    attention = DECODER_LAYER + QKV_BIAS * config.qkv_bias + QK_NORM * config.qk_norm
    entries = _entries(DECODER + HEAD * (not config.tie_embeddings), ours, theirs, sizes)
    entries += _entries(attention, ours + "layers.", layer, sizes, every)
    if dense:
        entries += _entries(DENSE, ours + "layers.", layer, sizes, dense)
    if sparse:
        entries += _entries(ROUTER, ours + "layers.", layer, sizes, sparse)
        entries += _entries(EXPERTS, ours + "layers.", layer, sizes, sparse, config.moe.num_experts)
        entries += _entries(
            RESIDUAL * config.moe.residual, ours + "layers.", layer, sizes | {"2": 2}, sparse
        )
    return entries


def adaptor_entries(vision_width: int, width: int) -> list[Entry]:
    """The four parameters between a tower and a language model of these widths."""
    first = _entries(
        ADAPTOR_LINEAR,
        "adaptor.linear_1.",
        "multi_modal_projector.linear_1.",
        {"i": vision_width, "o": width},
    )
    return first + _entries(
        ADAPTOR_LINEAR,
        "adaptor.linear_2.",
        "multi_modal_projector.linear_2.",
        {"i": width, "o": width},
    )


def llava_entries(config: ModelConfig) -> list[Entry]:
    """All parameters of a multimodal model."""
    tower, decoder = (
        vision_entries(config.vision, "vision_tower."),
        decoder_entries(config.decoder, "language_model."),
    )
    return tower + adaptor_entries(config.vision.hidden_size, config.decoder.hidden_size) + decoder


# Tensors of other files that no model here has: CLIP's text side, SigLIP's pooling head, constant tables, and the gate of
# qwen2_moe's shared expert (whose configuration says that it is of size 0; so its tensors are EMPTY).
IGNORED = re.compile(
    r"^text_model\.|^(visual|text)_projection\.|^logit_(scale|bias)$|(^|vision_model\.|vision_tower\.)head\."
    r"|\.rotary_emb\.inv_freq$|embeddings\.position_ids$|\.mlp\.shared_expert_gate\."
)
EMPTY = re.compile(r"\.mlp\.shared_expert\.")
ADAPTOR_SPELLINGS = (
    (re.compile(r"^(model\.)?multi_modal_projector\."), "multi_modal_projector."),
    (
        re.compile(r"^(model\.)?mm_projector\.(image_spatial_proj\.)?0\."),
        "multi_modal_projector.linear_1.",
    ),
    (
        re.compile(r"^(model\.)?mm_projector\.(image_spatial_proj\.)?2\."),
        "multi_modal_projector.linear_2.",
    ),
)
# Kind of file -> what of a name is written how in the tables, one after the other.
SPELLINGS = {
    "llava": (
        *ADAPTOR_SPELLINGS,
        (re.compile(r"^model\.language_model\."), "language_model.model."),
        (re.compile(r"^lm_head\."), "language_model.lm_head."),
        (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "vision_tower.vision_model."),
    ),
    "original": (  # original LLaVA; the LLaVA-MoD authors' (image_tower, deepspeed)
        *ADAPTOR_SPELLINGS,
        (
            re.compile(
                r"^model\.(vision_tower\.vision_tower|image_tower\.image_tower)\.(vision_model\.)?"
            ),
            "vision_tower.vision_model.",
        ),
        (re.compile(r"^(?=(model|lm_head)\.)"), "language_model."),
        (re.compile(r"\.mlp\.deepspeed_moe\.gate\.wg\."), ".mlp.gate."),
        (re.compile(r"\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\."), ".mlp.experts."),
    ),
    "adaptor": ADAPTOR_SPELLINGS,
    "language_model": (),
    "vision_tower": ((re.compile(r"^(vision_model\.)?"), "vision_model."),),
}
FUSED = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)$")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of theirs, or a part of a fused one; nothing is read before `read`.

    Attributes:
      tensor: anything with `.shape` and `.dtype` that slices into an array.
      index: of the part; None for the whole.
      shape: of the part.
    """

    tensor: object
    index: tuple | None
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The numbers, as they are stored."""
        return np.asarray(self.tensor[...] if self.index is None else self.tensor[self.index])


def canonical(tensors: Mapping, kind: str) -> dict[str, Piece]:
    """The tensors of a file under the names of the tables.

    Args:
      tensors: name -> array, or anything with `.shape` and `.dtype` that slices into one. 4.x and 5.x names; experts apart
        or fused (`gate_up_proj` [E, 2F, D], `down_proj` [E, D, F]).
      kind: a key of SPELLINGS.
    """
    pieces = {}
    for name, tensor in tensors.items():
        if IGNORED.search(name) or (EMPTY.search(name) and 0 in tensor.shape):
            continue
        for pattern, spelling in SPELLINGS[kind]:
            name = pattern.sub(spelling, name)
        fused = FUSED.match(name) if len(tensor.shape) == 3 else None
        pieces |= (
            _unfused(*fused.groups(), tensor)
            if fused
            else {name: Piece(tensor, None, tuple(tensor.shape))}
        )
    return pieces


def _unfused(prefix: str, projection: str, tensor) -> dict[str, Piece]:
    experts, rows, columns = tensor.shape
    half = rows // 2
    parts = (
        {"down_proj": slice(0, rows)}
        if projection == "down_proj"
        else {"gate_proj": slice(0, half), "up_proj": slice(half, rows)}
    )
    shape = {part: (index.stop - index.start, columns) for part, index in parts.items()}
    return {
        f"{prefix}{e}.{part}.weight": Piece(tensor, (e, index), shape[part])
        for e in range(experts)
        for part, index in parts.items()
    }


@dataclasses.dataclass(frozen=True)
class Stack:
    """One of our parameters in files of theirs: its shape and dtype now, its numbers when they are asked for.

    Attributes:
      entry: what it consists of.
      pieces: their tensors, in the order of `entry.places()`.
      dtype: that holds what is stored in any of them.
    """

    entry: Entry
    pieces: tuple[Piece, ...]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def blocks(self, indices: Iterable[tuple[slice, ...]]) -> list[np.ndarray]:
        """The parts of our array that `indices` name (a slice a dimension); each tensor is read once for all, and one at a time is in memory."""
        spans = [
            [range(*span.indices(size)) for span, size in zip(index, self.shape, strict=True)]
            for index in indices
        ]
        made = [np.empty([len(span) for span in part], self.dtype) for part in spans]
        for (place, _), piece in zip(self.entry.places(), self.pieces):
            wanted = [
                n
                for n, part in enumerate(spans)
                if all(at in span for at, span in zip(place, part))
            ]
            array = self.entry.to_ours(piece.read()) if wanted else None
            for n in wanted:
                inner = tuple(slice(span.start, span.stop) for span in spans[n][len(place) :])
                made[n][tuple(at - span.start for at, span in zip(place, spans[n]))] = array[inner]
        return made

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        (whole,) = self.blocks([(slice(None),) * len(self.shape)])
        return whole if dtype is None else whole.astype(dtype, copy=False)


def to_ours(
    entries: list[Entry], pieces: Mapping[str, Piece], source="the checkpoint"
) -> dict[str, Stack]:
    """Our parameters from their tensors (from `canonical`); only names, shapes and dtypes are looked at.

    Raises:
      ConfigError: listing every missing, unexpected and mis-shaped tensor, and those that hold no floating-point numbers.
    """
    shapes = {name: entry.their_shape for entry in entries for _, name in entry.places()}
    wrong = [f"missing {name}" for name in sorted(shapes.keys() - pieces.keys())]
    wrong += [f"unexpected {name}" for name in sorted(pieces.keys() - shapes.keys())]
    both = [name for name in shapes if name in pieces]
    wrong += [
        f"{name} has the shape {pieces[name].shape}, expected {shapes[name]}"
        for name in both
        if pieces[name].shape != shapes[name]
    ]
    wrong += [
        f"{name} has the dtype {pieces[name].tensor.dtype}, expected one of {tuple(DTYPES)}"
        for name in both
        if pieces[name].tensor.dtype not in DTYPES.values()
    ]
    _refuse(wrong, source)
    params = {}
    for entry in entries:
        parts = tuple(pieces[name] for _, name in entry.places())
        dtypes = {part.tensor.dtype for part in parts}
        params[entry.ours] = Stack(
            entry, parts, dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        )
    return params


def to_theirs(entries: list[Entry], params: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors from our parameters, one after the other.

    Raises:
      ConfigError: listing every missing, unexpected and mis-shaped parameter.
    """
    shapes = {entry.ours: entry.shape for entry in entries}
    wrong = [f"missing {name}" for name in sorted(shapes.keys() - params.keys())]
    wrong += [f"unexpected {name}" for name in sorted(params.keys() - shapes.keys())]
    both = sorted(params.keys() & shapes.keys())
    wrong += [
        f"{name} has the shape {params[name].shape}, expected {shapes[name]}"
        for name in both
        if params[name].shape != shapes[name]
    ]
    _refuse(wrong, "the parameters")
    for entry in entries:
        yield from _unstacked(
            entry, np.asarray(params[entry.ours])
        )  # one stack at a time is in memory


def _unstacked(entry: Entry, stacked: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for index, name in entry.places():
        yield (
            name,
            np.ascontiguousarray(entry.to_theirs(stacked[index])),
        )  # a view would keep the stack


def _refuse(wrong: list[str], source) -> None:
    if wrong:
        raise ConfigError(
            f"{source} does not fit its configuration; {len(wrong)} tensors differ: "
            + "; ".join(wrong)
        )
