"""Our parameters and Hugging Face's tensors: one table per part, read in both directions.

A row of a table is (our name, their name, their dimensions). Each letter is a dimension: our
dimensions are the letters at the end of our name, and a group of letters in theirs is one flattened
dimension. So a Linear [out, in] is "nh d" where ours is `w_dnh`. Their names are those that
transformers 4.x writes, which 5.x and vLLM read too; `canonical` brings other spellings to these.

Letters: d width, n attention heads, k key/value heads, h head size, f feed-forward, v vocabulary,
e experts, t positions of the tower, i o input and output of the adaptor, y x c row, column and
channel of a patch (p: the three together). Stacks of layers and experts come first.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mod_jax.config import ConfigError, DecoderConfig, ModelConfig, VisionConfig
from mod_jax.interop.finite import require_finite
from mod_jax.interop.folder import DTYPES, Tensor
from mod_jax.interop.hf_config import CLASS_TOKENS

Table = tuple[tuple[str, str, str], ...]

VISION: Table = (
    ("patches.w_pd", "embeddings.patch_embedding.weight", "d c y x"),
    ("positions.w_td", "embeddings.position_embedding.weight", "t d"),
    ("post_norm.scale_d", "post_layernorm.weight", "d"),
    ("post_norm.bias_d", "post_layernorm.bias", "d"),
)
VISION_FAMILY: dict[str, Table] = {
    "clip": (
        ("class_embedding_d", "embeddings.class_embedding", "d"),
        ("pre_norm.scale_d", "pre_layrnorm.weight", "d"),  # (sic)
        ("pre_norm.bias_d", "pre_layrnorm.bias", "d"),
    ),
    "siglip": (("patches.b_d", "embeddings.patch_embedding.bias", "d"),),
}
VISION_LAYER: Table = (
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
ADAPTOR_LINEAR: Table = (("w_io", "weight", "o i"), ("b_o", "bias", "o"))
DECODER: Table = (
    ("embedding.w_vd", "model.embed_tokens.weight", "v d"),
    ("norm.scale_d", "model.norm.weight", "d"),
)
HEAD: Table = (("head.w_vd", "lm_head.weight", "v d"),)
DECODER_LAYER: Table = (
    ("attention_norm.scale_d", "input_layernorm.weight", "d"),
    ("mlp_norm.scale_d", "post_attention_layernorm.weight", "d"),
    ("attention.query.w_dnh", "self_attn.q_proj.weight", "nh d"),
    ("attention.key.w_dkh", "self_attn.k_proj.weight", "kh d"),
    ("attention.value.w_dkh", "self_attn.v_proj.weight", "kh d"),
    ("attention.out.w_nhd", "self_attn.o_proj.weight", "d nh"),
)
QKV_BIAS: Table = (
    ("attention.query.b_nh", "self_attn.q_proj.bias", "nh"),
    ("attention.key.b_kh", "self_attn.k_proj.bias", "kh"),
    ("attention.value.b_kh", "self_attn.v_proj.bias", "kh"),
)
QK_NORM: Table = (
    ("attention.query_norm.scale_h", "self_attn.q_norm.weight", "h"),
    ("attention.key_norm.scale_h", "self_attn.k_norm.weight", "h"),
)
DENSE: Table = (
    ("mlp.gate.w_df", "mlp.gate_proj.weight", "f d"),
    ("mlp.up.w_df", "mlp.up_proj.weight", "f d"),
    ("mlp.down.w_fd", "mlp.down_proj.weight", "d f"),
)
ROUTER: Table = (("moe.router.w_de", "mlp.gate.weight", "e d"),)
EXPERTS: Table = (
    ("moe.experts.gate.w_edf", "mlp.experts.{expert}.gate_proj.weight", "f d"),
    ("moe.experts.up.w_edf", "mlp.experts.{expert}.up_proj.weight", "f d"),
    ("moe.experts.down.w_efd", "mlp.experts.{expert}.down_proj.weight", "d f"),
)
# These are DeepSpeed's names, as no model of transformers has such a layer.
RESIDUAL: Table = (
    ("moe.residual.gate.w_df", "mlp.mlp.gate_proj.weight", "f d"),
    ("moe.residual.up.w_df", "mlp.mlp.up_proj.weight", "f d"),
    ("moe.residual.down.w_fd", "mlp.mlp.down_proj.weight", "d f"),
    ("moe.residual.mix.w_d2", "mlp.coefficient.weight", "2 d"),  # 2: experts, shared expert
    ("moe.residual.mix.b_2", "mlp.coefficient.bias", "2"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters, and the Hugging Face tensors that it consists of.

    Attributes:
      ours: Name of our parameter.
      theirs: Name of their tensors, a template over {layer} and {expert}.
      our_dims: Letters of our dimensions, without the stacks.
      their_dims: Letters of their dimensions.
      sizes: Size of each letter.
      layers: Numbers of the stacked layers, ascending; empty if layers are not stacked.
      experts: Number of stacked experts in a layer; 0 if experts are not stacked.
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
        """Shape of our parameter, stacks included."""
        stacks = tuple(n for n in (len(self.layers), self.experts) if n)
        return stacks + _shape(self.our_dims, self.sizes)

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape of each of their tensors."""
        return _shape(self.their_dims, self.sizes)

    def places(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yields (index into our stacks, name) of each of their tensors."""
        stacks: dict[str, Sequence[int]] = {}
        if self.layers:
            stacks["layer"] = self.layers
        if self.experts:
            stacks["expert"] = range(self.experts)
        for place in itertools.product(*(enumerate(numbers) for numbers in stacks.values())):
            index = tuple(i for i, _ in place)
            numbers = {key: number for key, (_, number) in zip(stacks, place)}
            yield index, self.theirs.format(**numbers)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Rearranges one of their tensors to our dimensions."""
        return _rearrange(array, self.their_dims, self.our_dims, self.sizes)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Rearranges one element of our stacks to their dimensions."""
        return _rearrange(array, self.our_dims, self.their_dims, self.sizes)


def _shape(dims: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in group) for group in dims.split())


def _rearrange(array: np.ndarray, source: str, target: str, sizes: Mapping[str, int]) -> np.ndarray:
    letters = source.replace(" ", "")
    order = [letters.index(letter) for letter in target.replace(" ", "")]
    unflattened = array.reshape([sizes[letter] for letter in letters])
    return unflattened.transpose(order).reshape(_shape(target, sizes))


def _entries(
    table: Table,
    ours: str,
    theirs: str,
    sizes: Mapping[str, int],
    layers: Iterable[int] = (),
    experts: int = 0,
) -> list[Entry]:
    """Entries of a table, whose names get the prefixes `ours` and `theirs`."""
    layers = tuple(layers)
    entries = []
    for our_name, their_name, their_dims in table:
        letters = our_name.rpartition("_")[2]
        if experts:
            letters = letters.replace("e", "")
        our_dims = " ".join("yxc" if letter == "p" else letter for letter in letters)
        entry = Entry(
            ours + our_name, theirs + their_name, our_dims, their_dims, sizes, layers, experts
        )
        entries.append(entry)
    return entries


def vision_entries(config: VisionConfig, prefix: str = "") -> list[Entry]:
    """All parameters of a vision tower; `prefix` is put before their names."""
    ours = "vision_tower."
    theirs = prefix + "vision_model."
    sizes = {
        "d": config.hidden_size,
        "n": config.num_heads,
        "h": config.hidden_size // config.num_heads,
        "f": config.intermediate_size,
        "y": config.patch_size,
        "x": config.patch_size,
        "c": 3,
        "t": config.num_features + CLASS_TOKENS[config.family],
    }
    entries = _entries(VISION + VISION_FAMILY[config.family], ours, theirs, sizes)
    entries += _entries(
        VISION_LAYER,
        ours + "layers.",
        theirs + "encoder.layers.{layer}.",
        sizes,
        range(config.num_layers),
    )
    return entries


def decoder_entries(config: DecoderConfig, prefix: str = "") -> list[Entry]:
    """All parameters of a language model and its head; `prefix` is put before their names."""
    ours = "language_model."
    our_layer = ours + "layers."
    their_layer = prefix + "model.layers.{layer}."
    sizes = {
        "d": config.hidden_size,
        "n": config.num_heads,
        "k": config.num_kv_heads,
        "h": config.head_dim,
        "f": config.intermediate_size,
        "v": config.vocab_size,
        "e": config.moe.num_experts if config.moe else 0,
        "2": 2,
    }
    layers = range(config.num_layers)
    sparse = config.sparse_layers
    dense = [number for number in layers if number not in sparse]

    top = DECODER if config.tie_embeddings else DECODER + HEAD
    attention = DECODER_LAYER
    if config.qkv_bias:
        attention += QKV_BIAS
    if config.qk_norm:
        attention += QK_NORM
    entries = _entries(top, ours, prefix, sizes)
    entries += _entries(attention, our_layer, their_layer, sizes, layers)
    if dense:
        entries += _entries(DENSE, our_layer, their_layer, sizes, dense)
    if config.moe:
        experts = config.moe.num_experts
        entries += _entries(ROUTER, our_layer, their_layer, sizes, sparse)
        entries += _entries(EXPERTS, our_layer, their_layer, sizes, sparse, experts)
        if config.moe.residual:
            entries += _entries(RESIDUAL, our_layer, their_layer, sizes, sparse)
    return entries


def adaptor_entries(vision_width: int, width: int) -> list[Entry]:
    """The four parameters between a tower and a language model of these widths."""
    projector = "multi_modal_projector."
    first = {"i": vision_width, "o": width}
    second = {"i": width, "o": width}
    entries = _entries(ADAPTOR_LINEAR, "adaptor.linear_1.", projector + "linear_1.", first)
    entries += _entries(ADAPTOR_LINEAR, "adaptor.linear_2.", projector + "linear_2.", second)
    return entries


def llava_entries(config: ModelConfig) -> list[Entry]:
    """All parameters of a multimodal model."""
    entries = vision_entries(config.vision, "vision_tower.")
    entries += adaptor_entries(config.vision.hidden_size, config.decoder.hidden_size)
    entries += decoder_entries(config.decoder, "language_model.")
    return entries


def entries_of(config: ModelConfig | DecoderConfig | VisionConfig) -> list[Entry]:
    """All parameters of a model, or of a part of one."""
    if isinstance(config, ModelConfig):
        return llava_entries(config)
    if isinstance(config, DecoderConfig):
        return decoder_entries(config)
    return vision_entries(config)


# Tensors that are ignored because no model here has them: CLIP's text side, SigLIP's pooling head,
# constant tables, and the gate of qwen2_moe's shared expert. That expert itself is ignored only if
# its tensors are empty, as the configuration says that its size is 0.
IGNORED = re.compile(
    r"^text_model\.|^(visual|text)_projection\.|^logit_(scale|bias)$"
    r"|(^|vision_model\.|vision_tower\.)head\."
    r"|\.rotary_emb\.inv_freq$|embeddings\.position_ids$|\.mlp\.shared_expert_gate\."
)
EMPTY = re.compile(r"\.mlp\.shared_expert\.")

# (pattern, replacement)
Spelling = tuple[re.Pattern[str], str]

ADAPTOR_SPELLINGS: tuple[Spelling, ...] = (
    (re.compile(r"^base_model\.model\."), ""),  # that of a LoRA (PEFT)
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
_ORIGINAL_TOWER = (
    r"^model\.(vision_tower\.vision_tower|image_tower\.image_tower)\.(vision_model\.)?"
)
# Kind of file -> substitutions, made one after the other, that give the names of the tables.
SPELLINGS: dict[str, tuple[Spelling, ...]] = {
    "llava": (
        *ADAPTOR_SPELLINGS,
        (re.compile(r"^model\.language_model\."), "language_model.model."),
        (re.compile(r"^lm_head\."), "language_model.lm_head."),
        (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "vision_tower.vision_model."),
    ),
    # Original LLaVA, and the LLaVA-MoD authors (image_tower, deepspeed).
    "original": (
        *ADAPTOR_SPELLINGS,
        (re.compile(_ORIGINAL_TOWER), "vision_tower.vision_model."),
        (re.compile(r"^(?=(model|lm_head)\.)"), "language_model."),
        (re.compile(r"\.mlp\.deepspeed_moe\.gate\.wg\."), ".mlp.gate."),
        (re.compile(r"\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\."), ".mlp.experts."),
    ),
    "adaptor": ADAPTOR_SPELLINGS,
    "language_model": (),
    "vision_tower": ((re.compile(r"^(vision_model\.)?"), "vision_model."),),
}
# What an empty tensor says, in a message about it.
UNGATHERED = (
    " (DeepSpeed's ZeRO-3 leaves it empty if it is saved without being gathered: make the file "
    "again with zero_to_fp32.py)"
)
# Names in the weights of a whole model that are of its tower or language model, not its adaptor.
OTHER_PARTS = re.compile(
    r"^(model\.)?(language_model|vision_tower|image_tower|layers|embed_tokens|norm|lm_head)\."
)
FUSED = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)$")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A Hugging Face tensor, or a part of one with fused experts. `read` reads it.

    Attributes:
      tensor: The tensor.
      index: Index of the part in the tensor; None for the whole tensor.
      shape: Shape of the part.
    """

    tensor: Tensor
    index: tuple[int | slice, ...] | None
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Reads the numbers, in the dtype that they are stored in."""
        return np.asarray(self.tensor[...] if self.index is None else self.tensor[self.index])


def canonical(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Piece]:
    """Brings the tensors of a file to the names of the tables.

    Args:
      tensors: Name -> tensor or array, under names of transformers 4.x or 5.x. Experts may be
        separate or fused (`gate_up_proj` [E, 2F, D], `down_proj` [E, D, F]).
      kind: Kind of file, a key of SPELLINGS.
    """
    pieces: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        if IGNORED.search(name) or (EMPTY.search(name) and 0 in tensor.shape):
            continue
        for pattern, replacement in SPELLINGS[kind]:
            name = pattern.sub(replacement, name)
        fused = FUSED.match(name) if len(tensor.shape) == 3 else None
        if fused:
            prefix, projection = fused.groups()
            pieces |= _unfused(prefix, projection, tensor)
        else:
            pieces[name] = Piece(tensor, None, tuple(tensor.shape))
    return pieces


def of_adaptor(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """The tensors of the adaptor: all but those of the tower and the language model.

    In a file without layers, which holds an adaptor alone, that is all of them.
    """
    if not any(".layers." in f".{name}" for name in pieces):
        return dict(pieces)
    return {name: piece for name, piece in pieces.items() if not OTHER_PARTS.search(name)}


def _unfused(prefix: str, projection: str, tensor: Tensor) -> dict[str, Piece]:
    """The experts in a fused tensor, as one piece per expert and projection."""
    experts, rows, columns = tensor.shape
    half = rows // 2
    if projection == "down_proj":
        parts = {"down_proj": slice(0, rows)}
    else:
        parts = {"gate_proj": slice(0, half), "up_proj": slice(half, rows)}
    pieces = {}
    for expert in range(experts):
        for part, span in parts.items():
            shape = (span.stop - span.start, columns)
            pieces[f"{prefix}{expert}.{part}.weight"] = Piece(tensor, (expert, span), shape)
    return pieces


@dataclasses.dataclass(frozen=True)
class Stack:
    """One of our parameters in Hugging Face files. Its numbers are read on use.

    Attributes:
      entry: The tensors that the parameter consists of.
      pieces: These tensors, in the order of `entry.places()`.
      dtype: Dtype that holds the numbers of all pieces.
      source: Where the tensors come from, for error messages.
    """

    entry: Entry
    pieces: tuple[Piece, ...]
    dtype: np.dtype
    source: object

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.entry.shape

    def blocks(self, indices: Iterable[tuple[slice, ...]]) -> list[np.ndarray]:
        """Reads blocks of the parameter.

        Each tensor is read once for all blocks, and one tensor at a time is in memory.

        Args:
          indices: One slice per dimension, for each block.

        Raises:
          ConfigError: If a number that is read is not finite.
        """
        requests = [
            [range(*span.indices(size)) for span, size in zip(index, self.shape, strict=True)]
            for index in indices
        ]
        blocks = [np.empty([len(span) for span in request], self.dtype) for request in requests]
        for (place, name), piece in zip(self.entry.places(), self.pieces):
            # The blocks that contain this element of the stacks.
            matching = [
                number
                for number, request in enumerate(requests)
                if all(i in span for i, span in zip(place, request))
            ]
            if not matching:
                continue
            array = piece.read()
            require_finite(name, array, self.source)
            array = self.entry.to_ours(array)
            for number in matching:
                request = requests[number]
                target = tuple(i - span.start for i, span in zip(place, request))
                within = tuple(slice(span.start, span.stop) for span in request[len(place) :])
                blocks[number][target] = array[within]
        return blocks

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        (whole,) = self.blocks([(slice(None),) * len(self.shape)])
        return whole if dtype is None else whole.astype(dtype, copy=False)


def to_ours(
    entries: Sequence[Entry], pieces: Mapping[str, Piece], source="the checkpoint"
) -> dict[str, Stack]:
    """Makes our parameters of their tensors. Only names, shapes and dtypes are looked at.

    Args:
      entries: All parameters of the model.
      pieces: Their tensors, from `canonical`.
      source: Where the tensors come from, for the error message.

    Raises:
      ConfigError: Listing every missing and unexpected tensor, and every tensor whose shape is
        wrong or whose dtype is not one of DTYPES.
    """
    shapes = {name: entry.their_shape for entry in entries for _, name in entry.places()}
    faults = _name_faults(shapes, pieces)
    shared = [name for name in shapes if name in pieces]
    for name in shared:
        if pieces[name].shape != shapes[name]:
            fault = f"{name} has the shape {pieces[name].shape}, expected {shapes[name]}"
            faults.append(fault + (UNGATHERED if 0 in pieces[name].shape else ""))
    for name in shared:
        dtype = pieces[name].tensor.dtype
        if dtype not in DTYPES.values():
            faults.append(f"{name} has the dtype {dtype}, expected one of {tuple(DTYPES)}")
    _refuse(faults, source)
    params = {}
    for entry in entries:
        parts = tuple(pieces[name] for _, name in entry.places())
        dtypes = {part.tensor.dtype for part in parts}
        dtype = np.dtype(dtypes.pop()) if len(dtypes) == 1 else np.dtype(np.float32)
        params[entry.ours] = Stack(entry, parts, dtype, source)
    return params


def to_theirs(entries: Sequence[Entry], params: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """Yields their tensors (name, array) from our parameters, one after the other.

    Args:
      entries: All parameters of the model.
      params: Name -> array, or anything that `np.asarray` makes an array of.

    Raises:
      ConfigError: Listing every missing and unexpected parameter, and every wrong shape.
    """
    require_parameters(entries, params, "the parameters")
    for entry in entries:
        # Passed on unnamed, so that a single stack at a time is in memory.
        yield from _unstacked(entry, np.asarray(params[entry.ours]))


def require_parameters(entries: Sequence[Entry], params: Mapping, source: object) -> None:
    """Raises ConfigError listing every missing and unexpected parameter, and every wrong shape.

    Args:
      entries: All parameters of the model.
      params: Name -> anything with a shape.
      source: Where they come from, for the error message.
    """
    shapes = {entry.ours: entry.shape for entry in entries}
    faults = _name_faults(shapes, params)
    for name in sorted(params.keys() & shapes.keys()):
        if params[name].shape != shapes[name]:
            faults.append(f"{name} has the shape {params[name].shape}, expected {shapes[name]}")
    _refuse(faults, source)


def _unstacked(entry: Entry, stacked: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for index, name in entry.places():
        # A copy, as a view would keep the whole stack in memory.
        yield name, np.ascontiguousarray(entry.to_theirs(stacked[index]))


def _name_faults(expected: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    faults = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    faults += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    return faults


def _refuse(faults: list[str], source: object) -> None:
    if faults:
        raise ConfigError(
            f"{source} does not fit its configuration. "
            f"Tensors that differ ({len(faults)}): {'; '.join(faults)}"
        )
