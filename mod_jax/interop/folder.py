"""A Hugging Face folder's files: config.json, safetensors (one file or shards), and the tokenizer's. Needs no torch."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from mod_jax.config import require

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
TOKENIZER_FILES += ("tokenizer.model", "chat_template.jinja", "chat_template.json")


def read_config(folder) -> dict:
    """config.json of a folder. Raises ConfigError if there is none."""
    path = pathlib.Path(folder) / "config.json"
    require(path.is_file(), "folder", str(folder), "a Hugging Face folder with a config.json")
    return json.loads(path.read_text())


def read_processor(folder) -> dict:
    """The image processor's file: its own (4.x), or a part of the processor's (5.x); empty if there is neither."""
    own, whole = pathlib.Path(folder) / "preprocessor_config.json", pathlib.Path(folder) / "processor_config.json"
    if own.is_file():
        return json.loads(own.read_text())
    return json.loads(whole.read_text()).get("image_processor", {}) if whole.is_file() else {}


class _Lazy:
    """A tensor in an open safetensors file: slicing reads it."""

    def __init__(self, file, name: str):
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, index):
        return self._slice[index]


@contextlib.contextmanager
def open_tensors(folder) -> Iterator[dict[str, _Lazy]]:
    """Name -> tensor of a folder's safetensors, one file or shards; nothing is read before it is sliced, and only inside the context.

    Raises:
      ConfigError: if a file is not there.
    """
    folder = pathlib.Path(folder)
    index = folder / INDEX
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [WEIGHTS]
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    require(not absent, "folder", str(folder), f"the weights {absent} in it", "Other formats have to be converted to safetensors first.")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safetensors.safe_open(folder / shard, framework="numpy")) for shard in shards]
        yield {name: _Lazy(file, name) for file in files for name in file.offset_keys()}


def write(folder, files: dict[str, dict], tensors: Iterable[tuple[str, np.ndarray]], dtype: str, tokenizer_folder, shard_bytes: int) -> None:
    """Writes a folder, whole or not at all: under another name first, then renamed.

    Args:
      folder: must not exist.
      files: name -> contents of the JSON files.
      tensors: name, array.
      dtype: a key of DTYPES, of the tensors in the file.
      tokenizer_folder: where the tokenizer's files are copied from, or None.
      shard_bytes: a file of tensors grows to this size at most.
    Raises:
      ConfigError: if the folder exists, the tokenizer's does not hold one, or the dtype is another.
    """
    folder = pathlib.Path(folder)
    require(dtype in DTYPES, "dtype", dtype, f"one of {sorted(DTYPES)}")
    require(not folder.exists(), "folder", str(folder), "a folder that does not exist yet", "Remove it or choose another.")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _write_shards(unfinished, ((name, np.ascontiguousarray(array, DTYPES[dtype])) for name, array in tensors), shard_bytes)
    for name, values in files.items():
        (unfinished / name).write_text(json.dumps(values, indent=2) + "\n")
    if tokenizer_folder is not None:
        _copy_tokenizer(pathlib.Path(tokenizer_folder), unfinished)
    unfinished.rename(folder)


def _copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    require(bool(found), "tokenizer_folder", str(source), f"a folder with some of {TOKENIZER_FILES}")
    for path in found:
        shutil.copy(path, target)


def _write_shards(folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """One file, or several and an index; one shard at a time is in memory."""
    shards, shard, size, total = [], {}, 0, 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            shards.append(_write_shard(folder, len(shards), shard))
            shard, size = {}, 0
        shard[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    if len(shards) == 1:
        (folder / _shard_name(0)).rename(folder / WEIGHTS)
        return
    weight_map = {}
    for number, written in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _shard_name(number)).rename(folder / final)
        weight_map |= dict.fromkeys(written, final)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")


def _shard_name(number: int) -> str:
    return f"shard-{number}.safetensors"


def _write_shard(folder: pathlib.Path, number: int, tensors: dict[str, np.ndarray]) -> list[str]:
    save_file(tensors, folder / _shard_name(number), metadata={"format": "pt"})
    return list(tensors)
