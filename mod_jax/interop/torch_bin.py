"""`.bin` files of PyTorch: their tensors, and nothing else that a pickle could do. The only place that needs torch (`pip install mod-jax[bin]`)."""

import contextlib
import dataclasses
import pathlib
import pickle
import re
import zipfile

import ml_dtypes
import numpy as np

from mod_jax.config import ConfigError


class BadFile(ValueError):
    """A file of weights that cannot be read, or must not be."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in a mapped file: slicing reads it."""

    tensor: object  # torch.Tensor
    dtype: np.dtype | str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __getitem__(self, index) -> np.ndarray:
        import torch

        part = self.tensor[index].detach().contiguous()
        if (
            self.dtype == ml_dtypes.bfloat16
        ):  # which numpy does not have, so torch does not convert it
            return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()


def open_bin(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Name -> tensor of one file, which is mapped into memory: only its pickle of names and shapes is read, and code in it is refused, not run.

    Raises:
      BadFile: if it holds anything but tensors, is cut off, or was written before torch 1.6.
      ConfigError: if torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{path} is read by PyTorch, which is not installed. `pip install mod-jax[bin]`, or use the checkpoint's safetensors."
        ) from error
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise BadFile("it is cut off, or no zip archive, as torch.save writes since torch 1.6")
    try:
        tensors = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise BadFile(
            f"its pickle asks for {named[1] if named else 'more than tensors'}: refused, and nothing of it was run"
        ) from error
    except RuntimeError as error:
        raise BadFile(str(error).partition(". ")[0]) from error
    others = (
        [name for name, x in tensors.items() if not isinstance(x, torch.Tensor)]
        if isinstance(tensors, dict)
        else [type(tensors).__name__]
    )
    if others:
        raise BadFile(f"it holds more than tensors: {others}")
    dtypes = {
        torch.float32: np.dtype(np.float32),
        torch.float16: np.dtype(np.float16),
        torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    }
    return {name: _Tensor(x, dtypes.get(x.dtype, str(x.dtype))) for name, x in tensors.items()}
