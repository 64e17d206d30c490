"""Hugging Face folders, opened and saved.

The tables of names are in `names.py`, the meaning of config.json in `hf_config.py` (original LLaVA:
`original.py`), and the files in `folder.py`.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mod_jax.config import ConfigError, DecoderConfig, ModelConfig, VisionConfig, require
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.interop import hf_config, names, original
from mod_jax.interop.folder import (
    ADAPTOR,
    SHARD_BYTES,
    JsonObject,
    open_tensors,
    read_config,
    read_json,
    write,
)
from mod_jax.interop.image_processor import read_image_processor
from mod_jax.interop.pretrained import (
    PARTS,
    Adaptor,
    Config,
    Parameter,
    Pretrained,
    config_of_kind,
    config_with_vocabulary,
    decoder_of,
    with_decoder,
    with_vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREFIXES: dict[type[Config], str] = {
    ModelConfig: "",
    DecoderConfig: "language_model.",
    VisionConfig: "vision_tower.",
}
HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def _generation(folder: pathlib.Path) -> JsonObject:
    return read_json(folder / "generation_config.json")


def _llava(values: JsonObject, folder: pathlib.Path) -> ModelConfig:
    return hf_config.model_from_json(values, read_image_processor(folder), _generation(folder))


def _language_model(values: JsonObject, folder: pathlib.Path) -> DecoderConfig:
    return hf_config.decoder_from_json(values)


def _vision_tower(values: JsonObject, folder: pathlib.Path) -> VisionConfig:
    return hf_config.vision_from_json(values, read_image_processor(folder))


def _clip_or_siglip(values: JsonObject, folder: pathlib.Path) -> VisionConfig:
    """The vision tower of a model with a text side, which is ignored."""
    tower = values.get("vision_config", {})
    return _vision_tower(tower | {"model_type": f"{values['model_type']}_vision_model"}, folder)


# model_type of config.json -> the function that reads the configuration.
CONFIGS: dict[str, Callable[[JsonObject, pathlib.Path], Config]] = {
    "llava": _llava,
    "clip": _clip_or_siglip,
    "siglip": _clip_or_siglip,
    **dict.fromkeys(hf_config.TEXT_DEFAULTS, _language_model),
    **dict.fromkeys(hf_config.VISION_DEFAULTS, _vision_tower),
}


@contextlib.contextmanager
def open_folder(folder, vision_tower=None, tokenizer=None) -> Iterator[Pretrained[Config]]:
    """Opens the model in a folder, whose kind is read from its config.json.

    Supported are LlavaForConditionalGeneration (CLIP or SigLIP with llama, mistral, qwen2, qwen3,
    qwen2_moe or qwen3_moe), and these language models and towers alone, as transformers 4.x or 5.x
    write them; original LLaVA; and the LLaVA-MoD authors' dense and sparse models. Weights are
    safetensors or `.bin`, one file or shards, in float32, bfloat16 or float16.

    The files are open inside the context. Only their headers are read before a parameter is used.

    Args:
      folder: Folder with config.json and weights.
      vision_tower: Folder of the vision tower, for original LLaVA and the authors' models whose
        weights do not include the tower or whose tower has an unknown name.
      tokenizer: Folder of the tokenizer of these models, if it is not `folder`.

    Raises:
      ConfigError: For options that our model does not compute; for files that are missing or
        incomplete; for tensors that do not fit, all of which are listed by llava-hf's names.
    """
    folder = pathlib.Path(folder)
    values = read_config(folder)
    with contextlib.ExitStack() as files:
        if original.is_original(values):
            vision_tower = vision_tower or original.tower_folder(values)
            yield _open_original(values, folder, vision_tower, tokenizer or folder, files)
        else:
            yield _open_stock(values, folder, files)


def _read_config(values: JsonObject, folder: pathlib.Path) -> Config:
    require(
        values.get("model_type") in CONFIGS,
        "model_type",
        values.get("model_type"),
        f"one of {sorted(CONFIGS.keys() | original.FAMILIES)}",
        f"It is in {folder}/config.json.",
    )
    return CONFIGS[values["model_type"]](values, folder)


def config_from_json(
    values: JsonObject,
    folder: pathlib.Path,
    vision_tower=None,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
) -> Config:
    """Reads the configuration of a model of any kind, without its weights.

    Args:
      values: Contents of config.json.
      folder: Folder of its other files, such as that of the image processor; they may be missing.
      vision_tower: Folder of the vision tower, for original LLaVA and the authors' models; None
        takes the folder or the published tower that config.json names.
      tokenizer: Tokenizer of these models, which has the ids of their tokens; None takes Qwen's.

    Raises:
      ConfigError: For options that our model does not compute.
    """
    if not original.is_original(values):
        return _read_config(values, folder)
    decoder = original.language_model_from_json(values)
    tower = _tower_config(values, vision_tower or original.tower_folder(values))
    vision = config_of_kind(VisionConfig, tower, "vision tower", str(vision_tower))
    config = ModelConfig(original.with_features(vision, values), decoder)
    return config_with_vocabulary(config, tokenizer) if tokenizer else config


def _tower_config(values: JsonObject, vision_tower) -> Config:
    if vision_tower is None:
        return original.published_tower(values)
    folder = pathlib.Path(vision_tower)
    return _read_config(read_config(folder), folder)


def _open_stock(
    values: JsonObject, folder: pathlib.Path, files: contextlib.ExitStack
) -> Pretrained[Config]:
    config = _read_config(values, folder)
    pieces = names.canonical(files.enter_context(open_tensors(folder)), PARTS[type(config)])
    params = _to_ours(names.entries_of(config), pieces, folder)
    ends: tuple[int, ...] = ()
    if isinstance(config, DecoderConfig):
        ends = hf_config.end_tokens_of(
            values, {"model_type": values["model_type"]}, _generation(folder)
        )
    return Pretrained(config, params, str(folder), folder, ends)


def _open_original(
    values: JsonObject,
    folder: pathlib.Path,
    vision_tower,
    tokenizer,
    files: contextlib.ExitStack,
) -> Pretrained[ModelConfig]:
    decoder = original.language_model_from_json(values)
    pieces = names.canonical(files.enter_context(open_tensors(folder)), "original")
    has_tower = any(name.startswith("vision_tower.") for name in pieces)
    tower_config: Config
    tower_params: Mapping[str, Parameter]
    if has_tower:
        tower_config = _tower_config(values, vision_tower)
        tower_params = {}
        origin = str(folder)
    else:
        require(
            vision_tower is not None,
            "vision tower",
            None,
            f"a folder with the weights of {original.tower_name(values)}, as {folder} does not "
            "include its vision tower",
            "Name it: --vision-tower FOLDER.",
        )
        tower = files.enter_context(open_folder(vision_tower))
        tower_config = tower.config
        tower_params = tower.params
        origin = f"{folder} + {vision_tower}"
    vision = config_of_kind(VisionConfig, tower_config, "vision tower", str(vision_tower))
    config = ModelConfig(original.with_features(vision, values), decoder)
    entries = [
        entry
        for entry in names.llava_entries(config)
        if has_tower or not entry.ours.startswith("vision_tower.")
    ]
    params = {**tower_params, **_to_ours(entries, pieces, folder)}
    ends = hf_config.end_tokens_of(
        values, {"model_type": original.family(values)}, _generation(folder)
    )
    opened = Pretrained(config, params, origin, pathlib.Path(tokenizer), ends)
    return with_vocabulary(opened, _load_tokenizer(tokenizer))


def _load_tokenizer(folder) -> "PreTrainedTokenizerFast":
    try:
        return load_tokenizer(folder)
    except ConfigError as error:
        raise ConfigError(
            f"{error} The tokenizer is needed for the id of the picture token. "
            "Name its folder: --tokenizer FOLDER."
        ) from error


def _to_ours(
    entries: list[names.Entry], pieces: dict[str, names.Piece], source: pathlib.Path
) -> dict[str, names.Stack]:
    """`names.to_ours`, except that a head may repeat the embedding that it is tied to.

    A head that differs from the embedding contradicts the configuration and is an error.
    """
    has_head = any(entry.theirs in HEADS for entry in entries)
    repeated = [name for name in HEADS if name in pieces and not has_head]
    heads = {name: pieces.pop(name) for name in repeated}
    params = names.to_ours(entries, pieces, source)
    for name, head in heads.items():
        embedding = pieces[name.replace("lm_head", "model.embed_tokens")]
        require(
            np.array_equal(head.read(), embedding.read()),
            "tie_word_embeddings",
            True,
            f"False, as {name} in {source} differs from the embedding",
            "Correct its config.json.",
        )
    return params


@contextlib.contextmanager
def open_adaptor(path) -> Iterator[Adaptor]:
    """Opens the adaptor in a file or a folder. The file is open inside the context.

    Args:
      path: mm_projector.bin, as the first stage of original LLaVA and of the LLaVA-MoD authors
        leaves it, or non_lora_trainables.bin of a LoRA; its folder; or any file or folder with the
        weights of a whole model.

    Raises:
      ConfigError: If there is no adaptor of exactly two layers, or the files cannot be read
        (`open_tensors`).
    """
    path = pathlib.Path(path)
    with open_tensors(path, ADAPTOR) as tensors:
        pieces = names.of_adaptor(names.canonical(tensors, "adaptor"))
        first = pieces.get("multi_modal_projector.linear_1.weight")
        shape = first.shape if first else ()
        expected = "the tensors multi_modal_projector.linear_{1,2} or mm_projector.{0,2}"
        if 0 in shape:
            expected += f"; linear_1.weight has the shape {shape}{names.UNGATHERED}"
        require(len(shape) == 2 and 0 not in shape, "adaptor", str(path), expected)
        width, vision_width = shape
        entries = names.adaptor_entries(vision_width, width)
        yield Adaptor(names.to_ours(entries, pieces, path), str(path))


def _write_nothing(folder: pathlib.Path) -> None:
    pass


def save(
    folder,
    config: Config,
    params: Mapping,
    dtype: str = "float32",
    others: Callable[[pathlib.Path], object] = _write_nothing,
    shard_bytes: int = SHARD_BYTES,
    end_token_ids: Sequence[int] = (),
) -> None:
    """Writes a folder that stock transformers and vLLM load, completely or not at all.

    A whole model is a LlavaForConditionalGeneration, with qwen2_moe or qwen3_moe inside if it is
    sparse. A sparse decoder without QKV biases (llama) gets biases of zero, as qwen2_moe has them.

    Args:
      folder: Folder to create; it must not exist.
      config: Configuration of a model, or of the part of it that is written.
      params: Name -> array, or anything that `np.asarray` makes an array of. Of the parameters of a
        whole model, those of the part are used.
      dtype: Dtype of the tensors: float32, bfloat16 or float16.
      others: Function that writes further files into the folder: those of the processor and the
        tokenizer, and a model card.
      shard_bytes: Largest size of one file, in bytes.
      end_token_ids: Ids of the tokens that end a text of a language model alone.

    Raises:
      ConfigError: If transformers has no class that computes exactly the same, the parameters do
        not fit the configuration, a number does not fit the dtype, or the folder exists.
    """
    prefix = PREFIXES[type(config)]
    params = {name: array for name, array in params.items() if name.startswith(prefix)}
    config, params = _with_zero_biases(config, params)
    tensors = itertools.chain(
        names.to_theirs(names.entries_of(config), params), _shared_expert_gates(config)
    )
    files = hf_config.to_files(config, dtype, end_token_ids)
    write(folder, files, tensors, dtype, others, shard_bytes)


def checksum(params: Mapping) -> str:
    """SHA-256 over the names (sorted), shapes, dtypes and bytes of parameters.

    It identifies the frozen parts of a model.
    """
    digest = hashlib.sha256()
    for name in sorted(params):
        array = np.ascontiguousarray(params[name])
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _with_zero_biases(config: Config, params: Mapping) -> tuple[Config, Mapping]:
    """Turns a sparse llama into a sparse qwen2 with QKV biases of zero; keeps anything else."""
    decoder = decoder_of(config)
    if decoder is None or not decoder.moe or decoder.qkv_bias or decoder.qk_norm:
        return config, params
    decoder = dataclasses.replace(decoder, qkv_bias=True)
    biases = {
        entry.ours: np.zeros(entry.shape, np.float32)
        for entry in names.decoder_entries(decoder)
        if entry.ours.endswith((".b_nh", ".b_kh"))
    }
    return with_decoder(config, decoder), {**params, **biases}


def _shared_expert_gates(config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the gates that qwen2_moe has for a shared expert, even for one of size 0."""
    decoder = decoder_of(config)
    if decoder is None or decoder.qk_norm:  # qwen3_moe has no such gates
        return
    prefix = "language_model." if isinstance(config, ModelConfig) else ""
    for number in decoder.sparse_layers:
        gate = np.zeros((1, decoder.hidden_size), np.float32)
        yield f"{prefix}model.layers.{number}.mlp.shared_expert_gate.weight", gate
