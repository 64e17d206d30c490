"""PyTorch `.bin` files: only tensors are read from them, and no pickled code is run.

This is the only module that needs PyTorch (`pip install '.[bin]'`).
"""

import contextlib
import dataclasses
import pathlib
import pickle
import re
import zipfile
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from mod_jax.config import ConfigError

if TYPE_CHECKING:
    import torch


class BadFile(ValueError):
    """A file of weights that cannot be read, or is refused because it is unsafe."""


@dataclasses.dataclass(frozen=True)
class _TorchTensor:
    """A tensor in a memory-mapped file. Slicing it reads the slice.

    Attributes:
      tensor: PyTorch's view of the file.
      dtype: Numpy dtype of a supported floating-point tensor, else the name of PyTorch's dtype.
    """

    tensor: "torch.Tensor"
    dtype: np.dtype | str

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return tuple(self.tensor.shape)

    def __getitem__(self, index) -> np.ndarray:
        import torch

        part = self.tensor[index].detach().contiguous()
        # PyTorch cannot convert bfloat16 to numpy, which lacks it, so the bits are reinterpreted.
        if self.dtype == ml_dtypes.bfloat16:
            return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()


def open_bin(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, _TorchTensor]:
    """Maps a file into memory and returns name -> tensor.

    Only the pickle with names and shapes is read. Code in it is refused, not run.

    Args:
      path: The file.
      stack: Unused, as the mapping ends with its last tensor; all formats are opened alike.

    Raises:
      BadFile: If the file holds anything but tensors, is cut off, or was written before torch 1.6.
      ConfigError: If PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{path} can only be read with PyTorch, which is not installed. "
            "Run `pip install '.[bin]'`, or use safetensors of the same checkpoint."
        ) from error
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise BadFile("it is cut off, or not a zip archive as torch.save writes since 1.6")
    try:
        tensors = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        wanted = match[1] if match else "more than tensors"
        raise BadFile(
            f"its pickle asks for {wanted}: refused, and no code of it was run"
        ) from error
    except RuntimeError as error:
        raise BadFile(str(error).partition(". ")[0]) from error
    if not isinstance(tensors, dict):
        raise BadFile(f"it holds more than tensors: {[type(tensors).__name__]}")
    others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise BadFile(f"it holds more than tensors: {others}")
    dtypes = {
        torch.float32: np.dtype(np.float32),
        torch.float16: np.dtype(np.float16),
        torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    }
    return {
        name: _TorchTensor(tensor, dtypes.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in tensors.items()
    }
