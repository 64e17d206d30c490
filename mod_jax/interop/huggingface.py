"""Hugging Face folders in and out. Tables of names are in `names.py`, config.json's meaning in `hf_config.py`, files in `folder.py`."""

import contextlib
import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from mod_jax.config import ConfigError, DecoderConfig, ModelConfig, VisionConfig, require
from mod_jax.interop import hf_config, names, original
from mod_jax.interop.folder import ADAPTOR, SHARD_BYTES, open_tensors, read_config, read_json, write
from mod_jax.interop.image_processor import read_image_processor
from mod_jax.interop.pretrained import PARTS, Config, Pretrained, with_vocabulary

ENTRIES = {
    ModelConfig: names.llava_entries,
    DecoderConfig: names.decoder_entries,
    VisionConfig: names.vision_entries,
}
PREFIXES = {ModelConfig: "", DecoderConfig: "language_model.", VisionConfig: "vision_tower."}
HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def _llava(values: dict, folder: pathlib.Path) -> ModelConfig:
    return hf_config.model_from_json(
        values, read_image_processor(folder), read_json(folder / "generation_config.json")
    )


def _language_model(values: dict, folder: pathlib.Path) -> DecoderConfig:
    return hf_config.decoder_from_json(values)


def _vision_tower(values: dict, folder: pathlib.Path) -> VisionConfig:
    if values["model_type"] in ("clip", "siglip"):  # both sides: the text side is ignored
        values = values.get("vision_config", {}) | {
            "model_type": values["model_type"] + "_vision_model"
        }
    return hf_config.vision_from_json(values, read_image_processor(folder))


# model_type of config.json -> how the configuration is read
CONFIGS = {"llava": _llava, "clip": _vision_tower, "siglip": _vision_tower}
CONFIGS |= dict.fromkeys(hf_config.TEXT_DEFAULTS, _language_model) | dict.fromkeys(
    hf_config.VISION_DEFAULTS, _vision_tower
)


@contextlib.contextmanager
def open_folder(folder, vision_tower=None, tokenizer=None) -> Iterator[Pretrained]:
    """The model of a folder, by what its config.json says; its files are open inside the context, and nothing but their headers is read.

    LlavaForConditionalGeneration (CLIP or SigLIP with llama, mistral, qwen2, qwen3, qwen2_moe or qwen3_moe), these language models and towers
    alone, as transformers 4.x or 5.x writes them; original LLaVA, and the LLaVA-MoD authors' dense and sparse models. Safetensors or `.bin`,
    one file or shards, float32, bfloat16 or float16.

    Args:
      folder: with config.json and weights.
      vision_tower: folder of the tower, for original LLaVA and the authors' models: of one that has no tensors of its own, or an unknown name.
      tokenizer: folder of their tokenizer, if it is not the same.
    Raises:
      ConfigError: for what our model cannot compute, files that are not there or not whole, and a list of all tensors that do not fit (named as
        llava-hf names them).
    """
    folder = pathlib.Path(folder)
    values = read_config(folder)
    with contextlib.ExitStack() as files:
        if original.is_original(values):
            yield _open_original(
                values,
                folder,
                vision_tower or original.tower_folder(values),
                tokenizer or folder,
                files,
            )
        else:
            yield _open_stock(values, folder, files)


def _read_config(values: dict, folder: pathlib.Path) -> Config:
    kind = values.get("model_type")
    require(
        kind in CONFIGS,
        "model_type",
        kind,
        f"one of {sorted(CONFIGS.keys() | original.FAMILIES)}",
        f"It is what {folder}/config.json says.",
    )
    return CONFIGS[kind](values, folder)


def _open_stock(values: dict, folder: pathlib.Path, files: contextlib.ExitStack) -> Pretrained:
    config = _read_config(values, folder)
    pieces = names.canonical(files.enter_context(open_tensors(folder)), PARTS[type(config)])
    return Pretrained(
        config, _to_ours(ENTRIES[type(config)](config), pieces, folder), str(folder), folder
    )


def _open_original(
    values: dict, folder: pathlib.Path, vision_tower, tokenizer, files: contextlib.ExitStack
) -> Pretrained:
    decoder = original.language_model_from_json(values)
    pieces = names.canonical(files.enter_context(open_tensors(folder)), "original")
    if own := any(name.startswith("vision_tower.") for name in pieces):
        vision = (
            _read_config(read_config(vision_tower), pathlib.Path(vision_tower))
            if vision_tower
            else original.published_tower(values)
        )
        origin, params = str(folder), {}
    else:
        expected = f"a folder with the weights, as {folder} has none of its tower {original.tower_name(values)}"
        require(
            vision_tower is not None,
            "vision tower",
            None,
            expected,
            "Name it: --vision-tower FOLDER.",
        )
        other = files.enter_context(open_folder(vision_tower))
        vision, origin, params = other.config, f"{folder} + {vision_tower}", other.params
    require(
        isinstance(vision, VisionConfig),
        "vision tower",
        str(vision_tower),
        "a plain vision tower",
        f"It holds a {PARTS[type(vision)]}.",
    )
    config = ModelConfig(original.with_features(vision, values), decoder)
    entries = [
        entry
        for entry in names.llava_entries(config)
        if own or not entry.ours.startswith("vision_tower.")
    ]
    params = {**params, **_to_ours(entries, pieces, folder)}
    return with_vocabulary(
        Pretrained(config, params, origin, pathlib.Path(tokenizer)), _load_tokenizer(tokenizer)
    )


def _load_tokenizer(folder):
    from mod_jax.data.samples.tokenizer import (
        load_tokenizer,
    )  # brings transformers, which takes seconds, and no other layout needs it

    try:
        return load_tokenizer(folder)
    except ConfigError as error:
        raise ConfigError(
            f"{error} It says which token is a picture: name its folder, --tokenizer FOLDER."
        ) from error


def _to_ours(
    entries: list[names.Entry], pieces: dict[str, names.Piece], source
) -> dict[str, names.Stack]:
    """`names.to_ours`; some files repeat the tied embedding as a head, and one that differs is a head of its own, against the configuration."""
    tied = all(entry.theirs != name for entry in entries for name in HEADS)
    heads = {name: pieces.pop(name) for name in HEADS if tied and name in pieces}
    params = names.to_ours(entries, pieces, source)
    for name, head in heads.items():
        same = np.array_equal(
            head.read(), pieces[name.replace("lm_head", "model.embed_tokens")].read()
        )
        require(
            same,
            "tie_word_embeddings",
            True,
            f"False, as {name} in {source} differs from the embedding",
            "Correct its config.json.",
        )
    return params


@contextlib.contextmanager
def open_adaptor(path) -> Iterator[Pretrained]:
    """An adaptor alone, its file open inside the context.

    Args:
      path: mm_projector.bin, as the first stage of original LLaVA and of the LLaVA-MoD authors leaves it, its folder, or any folder or file
        with the weights of a whole model.
    Raises:
      ConfigError: if there is no two-layer adaptor in it, or as `open_folder` for its files.
    """
    path = pathlib.Path(path)
    with open_tensors(path, ADAPTOR) as tensors:
        pieces = {
            name: piece
            for name, piece in names.canonical(tensors, "adaptor").items()
            if name.startswith("multi_modal_projector.")
        }
        shape = getattr(pieces.get("multi_modal_projector.linear_1.weight"), "shape", ())
        require(
            len(shape) == 2,
            "adaptor",
            str(path),
            "the tensors multi_modal_projector.linear_{1,2} or mm_projector.{0,2}",
        )
        yield Pretrained(
            None,
            names.to_ours(names.adaptor_entries(shape[1], shape[0]), pieces, path),
            str(path),
            None,
        )


def save(
    folder,
    config: Config,
    params: Mapping,
    dtype: str = "float32",
    others: Callable[[pathlib.Path], None] = lambda folder: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that stock transformers and vLLM load: LlavaForConditionalGeneration (sparse: qwen2_moe inside), or the part that `config` is of.

    Args:
      folder: must not exist; it appears whole or not at all.
      config: of a model or a part. Sparse without QKV biases (llama): written with biases of zero, as qwen2_moe has them.
      params: name -> array, or what `np.asarray` makes one; a part is picked out of a whole model's.
      dtype: float32 | bfloat16 | float16, of the tensors.
      others: writes further files into the folder: the processor's, the tokenizer's, a model card.
      shard_bytes: a file grows to this size at most.
    Raises:
      ConfigError: if transformers has no exact match, the parameters do not fit the config, a number does not fit the dtype, or the folder exists.
    """
    params = {name: x for name, x in params.items() if name.startswith(PREFIXES[type(config)])}
    config, params = _with_zero_biases(config, params)
    tensors = itertools.chain(
        names.to_theirs(ENTRIES[type(config)](config), params), _shared_expert_gates(config)
    )
    write(folder, hf_config.to_files(config, dtype), tensors, dtype, others, shard_bytes)


def checksum(params: Mapping) -> str:
    """SHA-256 over the names (sorted), shapes, dtypes and bytes: the identity of frozen parts."""
    digest = hashlib.sha256()
    for name in sorted(params):
        array = np.ascontiguousarray(params[name])
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _with_zero_biases(config: Config, params: Mapping) -> tuple[Config, Mapping]:
    """A sparse llama as a sparse qwen2 with QKV biases of zero; anything else as it is."""
    decoder = config.decoder if isinstance(config, ModelConfig) else config
    if (
        not isinstance(decoder, DecoderConfig)
        or not decoder.moe
        or decoder.qkv_bias
        or decoder.qk_norm
    ):
        return config, params
    decoder = dataclasses.replace(decoder, qkv_bias=True)
    added = [
        entry for entry in names.decoder_entries(decoder) if entry.ours.endswith((".b_nh", ".b_kh"))
    ]
    config = (
        dataclasses.replace(config, decoder=decoder) if isinstance(config, ModelConfig) else decoder
    )
    return config, dict(params) | {entry.ours: np.zeros(entry.shape, np.float32) for entry in added}


def _shared_expert_gates(config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """qwen2_moe has the gate of a shared expert even where that expert has no size."""
    prefix, decoder = (
        ("language_model.", config.decoder) if isinstance(config, ModelConfig) else ("", config)
    )
    if not isinstance(decoder, DecoderConfig) or decoder.qk_norm:
        return  # a tower; qwen3_moe
    for number in decoder.sparse_layers:
        yield (
            f"{prefix}model.layers.{number}.mlp.shared_expert_gate.weight",
            np.zeros((1, decoder.hidden_size), np.float32),
        )
