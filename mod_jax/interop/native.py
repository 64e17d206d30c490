"""Our own form of a pretrained model: a folder with its configuration, an Orbax checkpoint of its parameters, and its processor's files.

    model.json   {"format": 1, "model": {"kind": ..., "config": {...}}, "origin": ...}; written last: a folder without it is not whole
    params/      Orbax, name -> array in the dtype it came in, sharded as the mesh it was written on
    tokenizer.json, preprocessor_config.json, ...   as the source has them

Local or on cloud storage. Large parameters are written one after the other: beside what Orbax needs for one, none is in memory.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import sys
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from mod_jax.config import ModelConfig, from_dict, require
from mod_jax.interop.folder import PROCESSOR_FILES
from mod_jax.interop.pretrained import PARTS, Parameter, Pretrained
from mod_jax.models import llava
from mod_jax.sharding import parameter_shardings

ABOUT, PARAMS, FORMAT = "model.json", "params", 1
CHUNK_BYTES = 2**27  # a stored array is cut into such pieces, so that any mesh reads what it needs
KINDS = {kind: cls for cls, kind in PARTS.items()}


def is_native(path) -> bool:
    """Whether a folder is one of these."""
    return (epath.Path(path) / ABOUT).is_file()


@dataclasses.dataclass(frozen=True)
class Stored:
    """A parameter in a checkpoint; `np.asarray` reads it."""

    folder: epath.Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def blocks(self, indices) -> list[np.ndarray]:
        """The parts that `indices` name; the whole is read."""
        whole = np.asarray(self)
        return [whole[index] for index in indices]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            wanted = np.broadcast_to(
                np.empty((), self.dtype), self.shape
            )  # says shape and dtype, and takes no memory
            array = ocp.load(self.folder, {self.name: wanted})[self.name]
        return array if dtype is None else array.astype(dtype, copy=False)


@contextlib.contextmanager
def open_native(path) -> Iterator[Pretrained]:
    """The model of a folder that `save_native` wrote.

    Raises:
      ConfigError: if it is of another version.
    """
    folder = epath.Path(path)
    about = json.loads((folder / ABOUT).read_text())
    require(
        about["format"] == FORMAT,
        f"format of {folder}",
        about["format"],
        f"{FORMAT}, the one this version writes",
        "Import the model again.",
    )
    config = from_dict(KINDS[about["model"]["kind"]], about["model"]["config"], f"{folder / ABOUT}")
    stored = ocp.metadata(folder / PARAMS).metadata
    params = {
        name: Stored(folder / PARAMS, name, tuple(x.shape), np.dtype(x.dtype))
        for name, x in stored.items()
    }
    yield Pretrained(config, params, about["origin"], folder)


def save_native(path, pretrained: Pretrained, mesh: Mesh | None = None) -> None:
    """Writes a folder, whole or not at all (on cloud storage: whole once model.json is there, which is last).

    Args:
      path: must not exist. On several hosts the same for all; each writes its part of every parameter.
      pretrained: what it holds.
      mesh: a whole model's parameters are cut as they lie on it in training; None: one device.
    Raises:
      ConfigError: if the folder exists, or a size does not divide over the mesh.
    """
    folder = epath.Path(path)
    require(
        not folder.exists() or not any(folder.iterdir()),
        "target",
        str(path),
        "a folder that does not exist yet",
        "Remove it or choose another.",
    )
    remote, first = "://" in str(path), jax.process_index() == 0
    work = folder if remote else folder.with_name(folder.name + ".unfinished")
    if first and work.exists():
        work.rmtree()
    _wait("emptied")
    try:
        _save_params(work / PARAMS, pretrained, _shardings(pretrained, mesh))
        if first:
            _copy_processor(pretrained.folder, work)
            model = {
                "kind": PARTS[type(pretrained.config)],
                "config": dataclasses.asdict(pretrained.config),
            }
            (work / ABOUT).write_text(
                json.dumps(
                    {"format": FORMAT, "model": model, "origin": pretrained.origin}, indent=1
                )
                + "\n"
            )
    except BaseException:
        if first and work.exists():
            work.rmtree()
        raise
    if first and not remote:
        if folder.exists():
            folder.rmdir()  # empty
        work.rename(folder)
    _wait("written")


def _wait(what: str) -> None:
    multihost_utils.sync_global_devices(f"native {what}")


def _shardings(pretrained: Pretrained, mesh: Mesh | None) -> dict:
    if mesh is None or not isinstance(pretrained.config, ModelConfig):
        return dict.fromkeys(
            pretrained.params, jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        )
    return parameter_shardings(mesh, pretrained.params, llava.axes(pretrained.config))


def _save_params(folder: epath.Path, pretrained: Pretrained, shardings: dict) -> None:
    context = ocp.Context()
    context.array.saving.use_compression = (
        False  # trained weights hardly shrink, and it takes eight times as long
    )
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    with context:
        for group in _groups(pretrained.params):
            arrays = jax.block_until_ready(
                {name: place(parameter, shardings[name]) for name, parameter in group.items()}
            )
            gc.collect()  # jax lets go of what it has copied when garbage is collected
            ocp.partial.save(folder, arrays)
            del arrays
            _trim()
        ocp.partial.finalize(folder)


def _groups(params: Mapping[str, Parameter]) -> Iterator[dict[str, Parameter]]:
    """What is written at once, as every write takes its time: one parameter, or as many as CHUNK_BYTES hold."""
    group, size = {}, 0
    for name, parameter in params.items():
        more = math.prod(parameter.shape) * np.dtype(parameter.dtype).itemsize
        if group and size + more > CHUNK_BYTES:
            yield group
            group, size = {}, 0
        group[name], size = parameter, size + more
    yield group


def _trim() -> None:
    """Gives what was freed back to the system: glibc keeps the writer's many small buffers, as much again as the largest parameter and more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def place(parameter: Parameter, sharding) -> jax.Array:
    """A parameter on devices, of which each host reads its part alone."""
    shape = tuple(parameter.shape)
    spans = {
        device: tuple(span.indices(n)[:2] for span, n in zip(index, shape))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    different = list(dict.fromkeys(spans.values()))  # replicas share a block
    blocks = parameter.blocks([tuple(slice(*span) for span in index) for index in different])
    arrays = [
        jax.device_put(blocks[different.index(index)], device) for device, index in spans.items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _copy_processor(source, target: epath.Path) -> None:
    for name in PROCESSOR_FILES if source is not None else ():
        if (epath.Path(source) / name).is_file():
            (epath.Path(source) / name).copy(target / name)
