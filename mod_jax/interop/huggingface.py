"""Hugging Face models in and out: folders of transformers on one side, our configurations and parameters on the other.

Parameters are flat dicts of float32 numpy arrays under our names (docs/architecture.md). The tables of names are in
`names.py`, config.json's meaning in `hf_config.py`, files in `folder.py`.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from mod_jax.config import DecoderConfig, ModelConfig, VisionConfig, require
from mod_jax.interop import hf_config, names
from mod_jax.interop.folder import SHARD_BYTES, open_tensors, read_config, read_processor, write
from mod_jax.models import llava

Params = dict[str, np.ndarray]


def load_llava(folder) -> tuple[ModelConfig, Params]:
    """A LlavaForConditionalGeneration with a CLIP or SigLIP tower and a llama, qwen2, qwen3 or qwen2_moe decoder.

    Tensors as transformers 4.x or 5.x writes them, one file or shards, float32, bfloat16 or float16.
    Raises:
      ConfigError: for what our model cannot compute, a file that is not there, and a list of all tensors that do not fit.
    """
    values = read_config(folder)
    require(values.get("model_type") == "llava", "model_type", values.get("model_type"), "'llava'", "load_language_model reads the other kinds.")
    config = hf_config.model_from_json(values, read_processor(folder))
    return config, _read_params(folder, "llava", names.llava_entries(config), config.decoder)


def load_language_model(folder) -> tuple[DecoderConfig, Params]:
    """A plain llama, qwen2, qwen3 or qwen2_moe; the names begin with `language_model.`. Raises as `load_llava`."""
    config = hf_config.decoder_from_json(read_config(folder))
    return config, _read_params(folder, "language_model", names.decoder_entries(config), config)


def load_vision_tower(folder) -> tuple[VisionConfig, Params]:
    """A plain CLIP or SigLIP tower, its text side (if any) ignored; the names begin with `vision_tower.`. Raises as `load_llava`."""
    values = read_config(folder)
    if values.get("model_type") in ("clip", "siglip"):
        values = values.get("vision_config", {}) | {"model_type": values["model_type"] + "_vision_model"}
    config = hf_config.vision_from_json(values, read_processor(folder))
    return config, _read_params(folder, "vision_tower", names.vision_entries(config))


LOADERS = {"llava": load_llava, "clip": load_vision_tower, "siglip": load_vision_tower}
LOADERS |= dict.fromkeys(hf_config.TEXT_DEFAULTS, load_language_model) | dict.fromkeys(hf_config.VISION_DEFAULTS, load_vision_tower)


def load(folder) -> tuple[ModelConfig | DecoderConfig | VisionConfig, Params]:
    """Whatever a folder holds, by the `model_type` of its config.json: one of the three above."""
    kind = read_config(folder).get("model_type")
    require(kind in LOADERS, "model_type", kind, f"one of {sorted(LOADERS)}")
    return LOADERS[kind](folder)


def assemble(vision_folder, language_folder, key: jax.Array, **model) -> tuple[ModelConfig, Params]:
    """A model from a pretrained tower, a pretrained language model and a fresh adaptor: what stage 1 starts from.

    Args:
      vision_folder, language_folder: folders of `load_vision_tower` and `load_language_model`.
      key: PRNG key of the adaptor.
      model: further fields of ModelConfig (image_token_id, end_token_id, dtype, ...).
    """
    (vision, tower), (decoder, language_model) = load_vision_tower(vision_folder), load_language_model(language_folder)
    config = ModelConfig(vision=vision, decoder=decoder, **model)
    # Under jit only what is returned is made: no second language model in memory.
    adaptor = jax.jit(lambda key: {name: x for name, x in llava.init(config, key).items() if name.startswith("adaptor.")})(key)
    return config, tower | {name: np.asarray(x) for name, x in adaptor.items()} | language_model


def save_llava(folder, config: ModelConfig, params: Mapping, dtype: str = "float32", tokenizer_folder=None, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a folder that stock transformers and vLLM load as LlavaForConditionalGeneration (sparse: qwen2_moe inside).

    Args:
      folder: must not exist; it appears whole or not at all.
      config, params: a model of ours. Sparse without QKV biases (llama): written with biases of zero, as qwen2_moe has them.
      dtype: float32 | bfloat16 | float16, of the tensors.
      tokenizer_folder: where the tokenizer's files are copied from.
      shard_bytes: a file grows to this size at most.
    Raises:
      ConfigError: if transformers has no exact match, the parameters do not fit the config, or the folder exists.
    """
    decoder, params = _with_zero_biases(config.decoder, params)
    config = dataclasses.replace(config, decoder=decoder)
    tensors = itertools.chain(names.to_theirs(names.llava_entries(config), params), _shared_expert_gates(decoder, "language_model."))
    files = {"config.json": hf_config.model_to_json(config, dtype), "preprocessor_config.json": hf_config.processor_to_json(config.vision)}
    write(folder, files, tensors, dtype, tokenizer_folder, shard_bytes)


def save_language_model(
    folder, config: DecoderConfig, params: Mapping, dtype: str = "float32", tokenizer_folder=None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the parameters under `language_model.` as a plain language model; arguments and errors as `save_llava`."""
    config, params = _with_zero_biases(config, _part(params, "language_model."))
    tensors = itertools.chain(names.to_theirs(names.decoder_entries(config), params), _shared_expert_gates(config))
    write(folder, {"config.json": hf_config.decoder_to_json(config, dtype)}, tensors, dtype, tokenizer_folder, shard_bytes)


def save_vision_tower(folder, config: VisionConfig, params: Mapping, dtype: str = "float32", shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the parameters under `vision_tower.` as a plain tower; arguments and errors as `save_llava`."""
    values = hf_config.vision_to_json(config) | {"dtype": dtype, "torch_dtype": dtype}
    files = {"config.json": values, "preprocessor_config.json": hf_config.processor_to_json(config)}
    tensors = names.to_theirs(names.vision_entries(config), _part(params, "vision_tower."))
    write(folder, files, tensors, dtype, None, shard_bytes)


def checksum(params: Mapping) -> str:
    """SHA-256 over the names (sorted), shapes, dtypes and bytes: the identity of frozen parts."""
    digest = hashlib.sha256()
    for name in sorted(params):
        array = np.ascontiguousarray(params[name])
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _read_params(folder, kind: str, entries: list[names.Entry], decoder: DecoderConfig | None = None) -> Params:
    with open_tensors(folder) as tensors:
        pieces = names.canonical(tensors, kind)
        if decoder and decoder.tie_embeddings:
            _drop_tied_head(pieces, folder)
        return names.to_ours(entries, pieces, folder)


def _drop_tied_head(pieces: dict, folder) -> None:
    """Some files repeat the embedding as the head; one that differs is a head of its own, against the configuration."""
    for name in [name for name in pieces if name.endswith("lm_head.weight")]:
        (head, _), (embedding, _) = pieces.pop(name), pieces.get(name.replace("lm_head", "model.embed_tokens"), (None, None))
        same = embedding is not None and np.array_equal(head[...], embedding[...])
        require(same, "tie_word_embeddings", True, f"False, as {name} in {folder} differs from the embedding", "Correct its config.json.")


def _part(params: Mapping, prefix: str) -> dict:
    return {name: array for name, array in params.items() if name.startswith(prefix)}


def _with_zero_biases(decoder: DecoderConfig, params: Mapping) -> tuple[DecoderConfig, Mapping]:
    """A sparse llama as a sparse qwen2 with QKV biases of zero; anything else as it is."""
    if not decoder.moe or decoder.qkv_bias or decoder.qk_norm:
        return decoder, params
    decoder = dataclasses.replace(decoder, qkv_bias=True)
    added = [entry for entry in names.decoder_entries(decoder) if entry.ours.endswith((".b_nh", ".b_kh"))]
    return decoder, dict(params) | {entry.ours: np.zeros(entry.shape, np.float32) for entry in added}


def _shared_expert_gates(decoder: DecoderConfig, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """qwen2_moe has the gate of a shared expert even where that expert has no size."""
    for number in decoder.sparse_layers:
        yield f"{prefix}model.layers.{number}.mlp.shared_expert_gate.weight", np.zeros((1, decoder.hidden_size), np.float32)


