"""Native folders: our own format of pretrained models, local or on cloud storage.

A folder holds

    model.json   {"format": 1, "model": {"kind": ..., "config": {...}}, "origin": ...}
    params/      Orbax checkpoint: name -> array in its original dtype, sharded as on the mesh that
                 it was written on
    tokenizer.json, preprocessor_config.json, ...   copied from the source

model.json is written last; a folder without it is incomplete. Large parameters are written one
after the other: only one of them, and what Orbax needs to write it, is in memory.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding
from orbax.checkpoint import v1 as ocp

from mod_jax.config import ConfigError, ModelConfig, from_dict, require
from mod_jax.interop import names
from mod_jax.interop.finite import require_finite
from mod_jax.interop.folder import JsonObject, copy_processor
from mod_jax.interop.hf_config import require_rows
from mod_jax.interop.pretrained import PARTS, Config, Parameter, Pretrained
from mod_jax.interop.stated import token_ids
from mod_jax.models import llava
from mod_jax.sharding import parameter_shardings
from mod_jax.storage.place import absolute, is_remote

ABOUT = "model.json"
PARAMS = "params"
FORMAT = 1
# Size of the chunks of a stored array, so that a host of any mesh reads little more than its part.
CHUNK_BYTES = 2**27
KINDS = {kind: config_class for config_class, kind in PARTS.items()}


def is_native(path) -> bool:
    """Whether a folder is a native one."""
    return (epath.Path(path) / ABOUT).is_file()


@dataclasses.dataclass(frozen=True)
class Stored:
    """A parameter in a checkpoint; `np.asarray` reads it.

    Attributes:
      folder: Folder of the Orbax checkpoint.
      name: Name of the parameter.
      shape: Size of each dimension.
      dtype: Dtype that the numbers are stored in.
    """

    folder: epath.Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def blocks(self, indices: Iterable[tuple[slice, ...]]) -> list[np.ndarray]:
        """Reads the whole parameter and returns views of the blocks that `indices` give."""
        whole = np.asarray(self)
        return [whole[index] for index in indices]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            # Gives the shape and the dtype without taking memory.
            template = np.broadcast_to(np.empty((), self.dtype), self.shape)
            array = ocp.load(self.folder, {self.name: template})[self.name]
        require_finite(self.name, np.asarray(array), self.folder)
        return array if dtype is None else array.astype(dtype, copy=False)


@contextlib.contextmanager
def open_native(path) -> Iterator[Pretrained[Config]]:
    """Opens the model in a native folder.

    Raises:
      ConfigError: If the folder was written by another version of the format, or its arrays are
        not those of its configuration.
    """
    folder = absolute(path)
    about, config = _read_about(folder)
    params = {
        name: Stored(folder / PARAMS, name, tuple(array.shape), np.dtype(array.dtype))
        for name, array in _metadata(folder / PARAMS).items()
    }
    names.require_parameters(names.entries_of(config), params, folder)
    ends = token_ids(str(folder / ABOUT), about.get("end_token_ids"))
    yield Pretrained(config, params, str(about.get("origin")), folder, ends)


def read_model_config(path) -> Config:
    """Reads the configuration in a native folder.

    Raises:
      ConfigError: If the folder was written by another version of the format.
    """
    return _read_about(absolute(path))[1]


def _read_about(folder: epath.Path) -> tuple[JsonObject, Config]:
    """Reads model.json, and the configuration in it."""
    path = folder / ABOUT
    remedy = "Import the model again."
    try:
        about = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}. {remedy}") from error
    is_object = isinstance(about, dict)
    found = about.get("format") if is_object else about
    expected = f"{FORMAT}, the format that this version reads"
    require(is_object and found == FORMAT, f"format of {folder}", found, expected, remedy)
    model = about.get("model")
    is_model = isinstance(model, dict) and isinstance(model.get("config"), dict)
    known = is_model and model.get("kind") in KINDS
    expected = f"an object with a config and a kind of {sorted(KINDS)}"
    require(known, f"model in {path}", model, expected, remedy)
    config = from_dict(KINDS[model["kind"]], model["config"], str(path))
    if isinstance(config, ModelConfig):
        require_rows(config, str(path))
    return about, config


def _metadata(folder: epath.Path) -> Mapping[str, Any]:
    """Name -> shape and dtype of each array of a checkpoint."""
    try:
        return ocp.metadata(folder).metadata
    except Exception as error:  # Orbax raises what its storage raises
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{folder}: expected an Orbax checkpoint ({reason[:200]}). Import the model again."
        ) from error


def save_native(path, pretrained: Pretrained[Config], mesh: Mesh | None = None) -> None:
    """Writes a native folder, completely or not at all.

    On cloud storage, where a folder cannot be renamed, it is complete once model.json is there.

    Args:
      path: Folder to create; it must not exist. It is the same on all hosts, each of which writes
        its part of every parameter.
      pretrained: Model to write.
      mesh: Mesh on which the parameters of a whole model are sharded as in training. None, or a
        part of a model, writes from one device.

    Raises:
      ConfigError: If the folder exists.
    """
    folder = absolute(path)
    require(
        not folder.exists() or not any(folder.iterdir()),
        "target",
        str(path),
        "a folder that does not exist yet",
        "Remove it or choose another.",
    )
    is_first_host = jax.process_index() == 0
    work = folder if is_remote(path) else folder.with_name(folder.name + ".unfinished")
    if is_first_host and work.exists():
        work.rmtree()
    _wait("emptied")
    try:
        _save_params(work / PARAMS, pretrained.params, _shardings(pretrained, mesh))
        if is_first_host:
            copy_processor(pretrained.folder, work)
            model = {
                "kind": PARTS[type(pretrained.config)],
                "config": dataclasses.asdict(pretrained.config),
            }
            about = {"format": FORMAT, "model": model, "origin": pretrained.origin}
            if pretrained.end_token_ids and not isinstance(pretrained.config, ModelConfig):
                about["end_token_ids"] = pretrained.end_token_ids
            (work / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    except BaseException:
        if is_first_host and work.exists():
            work.rmtree()
        raise
    if is_first_host and not is_remote(path):
        if folder.exists():
            folder.rmdir()  # it is empty, see above
        work.rename(folder)
    _wait("written")


def _wait(event: str) -> None:
    """Waits until all hosts have come to this event."""
    multihost_utils.sync_global_devices(f"native {event}")


def _shardings(pretrained: Pretrained[Config], mesh: Mesh | None) -> dict[str, Sharding]:
    if mesh is None or not isinstance(pretrained.config, ModelConfig):
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return dict.fromkeys(pretrained.params, one_device)
    return parameter_shardings(mesh, dict(pretrained.params), llava.axes(pretrained.config))


def _save_params(
    folder: epath.Path, params: Mapping[str, Parameter], shardings: dict[str, Sharding]
) -> None:
    context = ocp.Context()
    # Trained weights hardly shrink, and compression takes eight times as long.
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    with context:
        for group in _groups(params):
            arrays = {name: place(parameter, shardings[name]) for name, parameter in group.items()}
            jax.block_until_ready(arrays)
            gc.collect()  # makes jax release the host arrays that it has copied
            ocp.partial.save(folder, arrays)
            del arrays
            _trim()
        ocp.partial.finalize(folder)


def _groups(params: Mapping[str, Parameter]) -> Iterator[dict[str, Parameter]]:
    """Yields the parameters that are written together: one, or as many as CHUNK_BYTES hold.

    Small parameters are grouped because each call to Orbax takes its time.
    """
    group: dict[str, Parameter] = {}
    group_bytes = 0
    for name, parameter in params.items():
        size = math.prod(parameter.shape) * np.dtype(parameter.dtype).itemsize
        if group and group_bytes + size > CHUNK_BYTES:
            yield group
            group = {}
            group_bytes = 0
        group[name] = parameter
        group_bytes += size
    yield group


def _trim() -> None:
    """Returns freed memory to the operating system.

    Otherwise glibc keeps the many small buffers of the writer, which take at least as much memory
    again as the largest parameter.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def place(parameter: Parameter, sharding: Sharding) -> jax.Array:
    """Puts a parameter on devices; each host reads only its own part, and each block once."""
    shape = parameter.shape
    # Blocks are compared as (start, stop) pairs, as slices are not hashable before Python 3.12.
    spans = {
        device: tuple(span.indices(size)[:2] for span, size in zip(index, shape))
        for device, index in sharding.devices_indices_map(shape).items()
        if device in sharding.addressable_devices
    }
    unique = list(dict.fromkeys(spans.values()))  # replicas share a block
    blocks = parameter.blocks([tuple(slice(*span) for span in index) for index in unique])
    arrays = [
        jax.device_put(blocks[unique.index(index)], device) for device, index in spans.items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
