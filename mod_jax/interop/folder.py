"""A model folder's files: config.json, weights (safetensors or `.bin`, one file or shards), and the processor's."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from mod_jax.config import ConfigError, require
from mod_jax.interop.torch_bin import BadFile, open_bin

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    name: np.dtype(kind)
    for name, kind in (
        ("float32", np.float32),
        ("bfloat16", ml_dtypes.bfloat16),
        ("float16", np.float16),
    )
}
SAFETENSORS_DTYPES = {
    "F32": DTYPES["float32"],
    "BF16": DTYPES["bfloat16"],
    "F16": DTYPES["float16"],
}
SHARD_BYTES = 5 * 10**9
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
PROCESSOR_FILES += (
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def read_json(path: pathlib.Path) -> dict:
    """An object in a JSON file; empty if there is no file. Raises ConfigError if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}. Fetch it again.") from error
    require(isinstance(values, dict), str(path), values, "an object")
    return values


def read_config(folder) -> dict:
    """config.json of a folder. Raises ConfigError if there is none, or it is one of an adapter."""
    path = pathlib.Path(folder) / "config.json"
    adapter = path.with_name("adapter_config.json")
    require(
        not adapter.is_file(),
        "folder",
        str(folder),
        f"whole weights, not a LoRA ({adapter.name})",
        "Merge it into the model it was trained on first.",
    )
    require(path.is_file(), "folder", str(folder), "a Hugging Face folder with a config.json")
    return read_json(path)


class _Lazy:
    """A tensor in an open safetensors file: slicing reads it."""

    def __init__(self, file, name: str):
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        self.dtype = SAFETENSORS_DTYPES.get(self._slice.get_dtype(), self._slice.get_dtype())

    def __getitem__(self, index):
        return self._slice[index]


def open_safetensors(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, _Lazy]:
    """Name -> tensor of one file, until `stack` closes."""
    file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    return {name: _Lazy(file, name) for name in file.offset_keys()}


FORMATS = {
    ".safetensors": open_safetensors,
    ".bin": open_bin,
}  # suffix of a file -> how it is opened
WHOLE = (
    WEIGHTS,
    "pytorch_model.bin",
)  # a model's weights: the file, or shards with the index NAME.index.json; the first that a folder has is read
ADAPTOR = (
    "mm_projector.bin",
    *WHOLE,
)  # an adaptor's: alone, as the first stage of LLaVA leaves it, or in a whole model


@contextlib.contextmanager
def open_tensors(path, names: tuple[str, ...] = WHOLE) -> Iterator[dict]:
    """Name -> tensor of a file, or of a folder's weights; nothing is read before it is sliced, and only inside the context.

    A tensor has `.shape` and `.dtype`, and slices into a numpy array.

    Args:
      path: a folder, or one file.
      names: of the weights in a folder, the best first.
    Raises:
      ConfigError: listing every file that is not there or cannot be read, and every tensor that the index promises and its file lacks.
    """
    path = pathlib.Path(path)
    folder, names = (path.parent, (path.name,)) if path.is_file() else (path, names)
    found = [
        name
        for name in names
        if pathlib.Path(name).suffix in FORMATS
        and ((folder / name).is_file() or (folder / f"{name}.index.json").is_file())
    ]
    require(
        bool(found),
        "weights",
        str(path),
        f"a file of {tuple(FORMATS)}, or a folder with one of {names} or an index of shards (NAME.index.json)",
    )
    promised = _read_index(folder / f"{found[0]}.index.json")
    tensors, wrong = {}, []
    with contextlib.ExitStack() as stack:
        for shard in sorted(set(promised.values())) or [found[0]]:
            try:
                there = FORMATS[pathlib.Path(shard).suffix](folder / shard, stack)
            except FileNotFoundError:
                wrong.append(f"{shard} is not there")
                continue
            except (OSError, safetensors.SafetensorError, BadFile) as error:
                wrong.append(f"{shard} cannot be read ({' '.join(str(error).split())})")
                continue
            wrong += [
                f"{shard} lacks {name}"
                for name, place in promised.items()
                if place == shard and name not in there
            ]
            tensors |= there
        if wrong:
            raise ConfigError(
                f"the weights in {folder} cannot be used: "
                + "; ".join(wrong)
                + ". Fetch what is missing or broken again."
            )
        yield tensors


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """Tensor -> file; empty if there is no index."""
    index = read_json(path)
    promised = index.get("weight_map")
    known = isinstance(promised, dict) and all(
        isinstance(shard, str) and pathlib.Path(shard).suffix in FORMATS
        for shard in promised.values()
    )
    require(
        known or not index,
        f"weight_map of {path}",
        promised,
        f"the file of each tensor, one of {tuple(FORMATS)}",
    )
    return promised or {}


def write(
    folder,
    files: dict[str, dict],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    others: Callable[[pathlib.Path], None],
    shard_bytes: int,
) -> None:
    """Writes a folder, whole or not at all: under another name first, then renamed.

    Args:
      folder: must not exist.
      files: name -> contents of the JSON files.
      tensors: name, array.
      dtype: a key of DTYPES, of the tensors in the file.
      others: writes further files into the folder.
      shard_bytes: a file of tensors grows to this size at most.
    Raises:
      ConfigError: if the folder exists, the dtype is another, or a number is too large for it.
    """
    folder = pathlib.Path(folder)
    require(dtype in DTYPES, "dtype", dtype, f"one of {tuple(DTYPES)}")
    require(
        not folder.exists(),
        "folder",
        str(folder),
        "a folder that does not exist yet",
        "Remove it or choose another.",
    )
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write_shards(
            unfinished, ((name, _as(dtype, name, array)) for name, array in tensors), shard_bytes
        )
        for name, values in files.items():
            (unfinished / name).write_text(json.dumps(values, indent=2) + "\n")
        others(unfinished)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    unfinished.rename(folder)


def _as(dtype: str, name: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array, DTYPES[dtype])
    if dtype == "float16":  # its largest number is 65504
        fits = np.isfinite(converted).all() or not np.isfinite(array).all()
        require(
            fits,
            "dtype",
            dtype,
            f"one that holds {name}, with numbers up to {np.abs(array).max()}",
            "Choose bfloat16 or float32.",
        )
    return converted


def _write_shards(
    folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
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
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    )


def _shard_name(number: int) -> str:
    return f"shard-{number}.safetensors"


def _write_shard(folder: pathlib.Path, number: int, tensors: dict[str, np.ndarray]) -> list[str]:
    path = folder / _shard_name(number)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(
        0o644
    )  # safetensors keeps its files to their owner; who serves a model may be another
    return list(tensors)
