"""Files of a Hugging Face model folder: config.json, the weights, and those of the processor.

Weights are safetensors or PyTorch `.bin` files, either one file or shards with an index.
"""

import contextlib
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save_file

from mod_jax.config import ConfigError, require
from mod_jax.interop.finite import require_finite
from mod_jax.interop.torch_bin import BadFile, open_bin

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
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
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)

JsonObject = dict[str, Any]

log = logging.getLogger(__name__)


class Tensor(Protocol):
    """A tensor of an open file. Slicing it reads the slice as a numpy array.

    Attributes:
      shape: Size of each dimension.
      dtype: Numpy dtype if it is one of DTYPES, otherwise the name of the dtype.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""

    @property
    def dtype(self) -> np.dtype | str:
        """Type of the numbers."""

    def __getitem__(self, index) -> np.ndarray: ...


def read_json(path: pathlib.Path) -> JsonObject:
    """Reads the object in a JSON file; an empty one if the file does not exist.

    Raises:
      ConfigError: If the file holds anything else.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}. Download it again.") from error
    require(isinstance(values, dict), str(path), values, "a JSON object")
    return values


def read_config(folder) -> JsonObject:
    """Reads config.json of a folder.

    Raises:
      ConfigError: If there is none, or the folder holds a LoRA adapter, or an adaptor alone.
    """
    path = pathlib.Path(folder) / "config.json"
    adaptors = [name for name in ADAPTORS_ALONE if path.with_name(name).is_file()]
    use = "Name it as the adaptor (--adaptor) beside --language-model and --vision-tower."
    remedy = "Merge it into the model that it was trained on first."
    if adaptors:
        remedy += f" Its {adaptors[0]} holds the adaptor alone. {use}"
    lora = path.with_name("adapter_config.json")
    expected = f"whole weights, not a LoRA ({lora.name})"
    require(not lora.is_file(), "folder", str(folder), expected, remedy)
    is_whole = any(_is_stored(path.parent, name) for name in WHOLE)
    require(
        is_whole or not adaptors,
        "folder",
        str(folder),
        f"the weights of a model; it holds an adaptor alone ({', '.join(adaptors)}), as LLaVA's "
        "first stage leaves it",
        use,
    )
    require(path.is_file(), "folder", str(folder), "a Hugging Face folder with a config.json")
    return read_json(path)


def copy_processor(source, target: epath.Path) -> None:
    """Copies the processor's files that a folder has. Both folders may be on cloud storage."""
    for name in PROCESSOR_FILES:
        file = epath.Path(source) / name
        if file.is_file():
            file.copy(target / name)


class _SafetensorsTensor:
    """A tensor in an open safetensors file."""

    def __init__(self, file, name: str):
        self._slice = file.get_slice(name)
        self.shape: tuple[int, ...] = tuple(self._slice.get_shape())
        dtype = self._slice.get_dtype()
        self.dtype: np.dtype | str = SAFETENSORS_DTYPES.get(dtype, dtype)

    def __getitem__(self, index) -> np.ndarray:
        return self._slice[index]


def open_safetensors(
    path: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, _SafetensorsTensor]:
    """Opens a file until `stack` closes, and returns name -> tensor."""
    file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    return {name: _SafetensorsTensor(file, name) for name in file.offset_keys()}


# Suffix of a file -> the function that opens it.
FORMATS: dict[str, Callable[[pathlib.Path, contextlib.ExitStack], Mapping[str, Tensor]]] = {
    ".safetensors": open_safetensors,
    ".bin": open_bin,
}
# Files that may hold the weights of a model, in order of preference. Each is either the file itself
# or the name of shards with the index NAME.index.json.
WHOLE = (WEIGHTS, "pytorch_model.bin")
# Files that hold an adaptor alone: of LLaVA's first stage, and of a LoRA.
ADAPTORS_ALONE = ("mm_projector.bin", "non_lora_trainables.bin")
# Files that may hold an adaptor, alone or in a whole model.
ADAPTOR = (*ADAPTORS_ALONE, *WHOLE)


@contextlib.contextmanager
def open_tensors(path, names: tuple[str, ...] = WHOLE) -> Iterator[dict[str, Tensor]]:
    """Opens the weights in a file or a folder, and yields name -> tensor.

    A tensor is only read when it is sliced, which is possible inside the context only. One file
    comes before shards with an index, as in transformers. If both are there, they have to be the
    same.

    Args:
      path: A folder, or one file.
      names: File names of the weights in a folder, in order of preference.

    Raises:
      ConfigError: Listing every file that is missing or unreadable, and every tensor that its file
        lacks although the index lists it; or if a file and shards beside it are different weights.
    """
    path = pathlib.Path(path)
    if path.is_file():
        folder = path.parent
        names = (path.name,)
    else:
        folder = path
    found = [name for name in names if _is_stored(folder, name)]
    require(
        bool(found),
        "weights",
        str(path),
        f"a file with one of the suffixes {tuple(FORMATS)}, or a folder with one of {names} or an "
        "index of its shards (NAME.index.json)",
    )
    name = found[0]
    shard_of = _read_index(folder / f"{name}.index.json")
    shards = set(shard_of.values())
    is_one_file = (folder / name).is_file() and shards != {name}
    with contextlib.ExitStack() as stack:
        if is_one_file and shards and all((folder / shard).is_file() for shard in shards):
            one = _open_files(folder, {name}, {}, stack)
            _require_same(folder, name, one, _open_files(folder, shards, shard_of, stack))
            yield one
        elif is_one_file:
            if shards:
                log.warning("%s/%s.index.json is not used, as %s is there", folder, name, name)
            yield _open_files(folder, {name}, {}, stack)
        else:
            yield _open_files(folder, shards, shard_of, stack)


def _open_files(
    folder: pathlib.Path,
    files: set[str],
    shard_of: Mapping[str, str],
    stack: contextlib.ExitStack,
) -> dict[str, Tensor]:
    """Opens the tensors of several files until `stack` closes; `shard_of` is their index."""
    tensors: dict[str, Tensor] = {}
    faults: list[str] = []
    for file in sorted(files):
        try:
            opened = FORMATS[pathlib.Path(file).suffix](folder / file, stack)
        except FileNotFoundError:
            faults.append(f"{file} is missing")
            continue
        except (OSError, safetensors.SafetensorError, BadFile) as error:
            faults.append(f"{file} cannot be read ({' '.join(str(error).split())})")
            continue
        indexed = [name for name, place in shard_of.items() if place == file]
        faults += [f"{file} lacks {name}" for name in indexed if name not in opened]
        tensors.update(opened)
    if faults:
        raise ConfigError(
            f"the weights in {folder} cannot be used: {'; '.join(faults)}. "
            "Download what is missing or broken again."
        )
    return tensors


def _require_same(
    folder: pathlib.Path, file: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> None:
    """Raises ConfigError if one file and the shards beside it hold different tensors."""

    def is_same(name: str) -> bool:
        shapes = (one[name].shape, other[name].shape)
        if shapes[0] != shapes[1] or 0 in shapes[0]:  # an empty tensor cannot be sliced
            return shapes[0] == shapes[1]
        return np.array_equal(one[name][...], other[name][...])

    different = sorted(one.keys() ^ other.keys()) or [name for name in one if not is_same(name)]
    if different:
        raise ConfigError(
            f"{folder} holds weights twice, and they contradict each other: {file}, and the shards "
            f"in {file}.index.json ({len(different)} tensors differ, first {different[0]}). "
            "Remove the wrong ones; transformers reads the one file."
        )


def _is_stored(folder: pathlib.Path, name: str) -> bool:
    """Whether a folder has weights of this name, as one file or as shards with an index."""
    if pathlib.Path(name).suffix not in FORMATS:
        return False
    return (folder / name).is_file() or (folder / f"{name}.index.json").is_file()


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """Reads tensor name -> shard from an index; empty if there is no index."""
    index = read_json(path)
    if not index:
        return {}
    shard_of = index.get("weight_map")
    valid = isinstance(shard_of, dict) and all(
        isinstance(shard, str) and pathlib.Path(shard).suffix in FORMATS
        for shard in shard_of.values()
    )
    require(
        valid,
        f"weight_map of {path}",
        shard_of,
        f"the name of each tensor's file, with one of the suffixes {tuple(FORMATS)}",
    )
    return index["weight_map"]


def write(
    folder,
    files: Mapping[str, JsonObject],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    others: Callable[[pathlib.Path], object],
    shard_bytes: int,
) -> None:
    """Writes a folder, completely or not at all: under a temporary name first, then renamed.

    Args:
      folder: Folder to create; it must not exist.
      files: File name -> contents of the JSON files.
      tensors: Pairs of name and array.
      dtype: Dtype of the tensors in the file, a key of DTYPES.
      others: Function that writes further files into the folder.
      shard_bytes: Largest size of one file of tensors, in bytes.

    Raises:
      ConfigError: If the folder exists, the dtype is unknown, or a number is too large for it.
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
        converted = ((name, _convert(dtype, name, array)) for name, array in tensors)
        _write_shards(unfinished, converted, shard_bytes)
        for name, values in files.items():
            (unfinished / name).write_text(json.dumps(values, indent=2) + "\n")
        others(unfinished)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    unfinished.rename(folder)


def _convert(dtype: str, name: str, array: np.ndarray) -> np.ndarray:
    """Converts a tensor to a dtype.

    Raises:
      ConfigError: If a number is not finite, or too large for the dtype.
    """
    require_finite(name, array, "the model")
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array, DTYPES[dtype])
    # The largest float16 is 65504, the largest bfloat16 a little less than the largest float32.
    overflowed = converted.dtype != array.dtype and not np.isfinite(converted).all()
    require(
        not overflowed,
        "dtype",
        dtype,
        f"one that holds {name}, whose numbers go up to {np.abs(array).max()}",
        "Choose bfloat16 or float32." if dtype == "float16" else "Choose float32.",
    )
    return converted


def _write_shards(
    folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    """Writes one file, or several with an index. One shard at a time is in memory."""
    shards: list[list[str]] = []  # tensor names of each shard that is written
    shard: dict[str, np.ndarray] = {}
    size = 0
    total_size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            shards.append(_write_shard(folder, len(shards), shard))
            shard = {}
            size = 0
        shard[name] = array
        size += array.nbytes
        total_size += array.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    if len(shards) == 1:
        (folder / _shard_name(0)).rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        final_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _shard_name(number)).rename(folder / final_name)
        weight_map |= dict.fromkeys(names, final_name)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shard_name(number: int) -> str:
    """Temporary name of a shard, for as long as the number of shards is unknown."""
    return f"shard-{number}.safetensors"


def _write_shard(folder: pathlib.Path, number: int, tensors: dict[str, np.ndarray]) -> list[str]:
    """Writes one shard and returns the names of its tensors."""
    path = folder / _shard_name(number)
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors creates files that only their owner may read; another user may serve the model.
    path.chmod(0o644)
    return list(tensors)
