"""The products of matrices in a compiled program, and their floating-point operations.

A product of f[m,k] and f[k,n] takes 2 m k n. XLA writes it as a dot, on TPUs as a convolution, or
as a call of cuBLAS. A product whose rows come in groups is a call of a kernel, of which the text
shows shapes alone: f[n,D] with weights f[E,D,F], or the sum f[E,D,F] over groups of rows, takes
2 n D F.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from mod_jax.rehearsal.program import Instruction

KERNELS = (
    "tpu_custom_call",
    "mosaic_gpu",
    "mosaic_gpu_v2",
    "__gpu$xla.gpu.triton",
    "triton_kernel_call",
)


class Product(NamedTuple):
    """A product.

    Attributes:
      flops: Operations of one run; of a kernel for rows in groups, if every row is in a group.
      rows: Rows of such a kernel; 0 for all other products.
    """

    flops: int
    rows: int = 0


def product(instruction: Instruction) -> Product | None:
    """The product that an instruction computes, if it is one.

    Attention's kernels are none: what they compute depends on their masks.
    """
    if instruction.opcode == "dot":
        return Product(_dot(instruction, instruction.numbers("lhs_contracting_dims")))
    if instruction.opcode == "convolution":
        return Product(_convolution(instruction))
    if instruction.opcode != "custom-call":
        return None
    if instruction.target.startswith("__cublas"):
        numbers = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.attributes)
        assert numbers is not None, instruction.name
        return Product(_dot(instruction, [int(axis) for axis in json.loads(numbers[1])]))
    if instruction.target in KERNELS:
        return _grouped(instruction)
    return None


def _dot(instruction: Instruction, contracted: Sequence[int]) -> int:
    lhs, result = instruction.operands[0], instruction.results[0]
    return 2 * math.prod(result.shape) * math.prod(lhs.shape[axis] for axis in contracted)


def _grouped(instruction: Instruction) -> Product | None:
    """The product of a kernel for rows in groups; None if its shapes are not those of one."""
    result = instruction.results[0].shape
    shapes = [array.shape for array in instruction.operands if array.dtype[0] in "bf"]
    matrices = [shape for shape in shapes if len(shape) == 2]
    stacks = [shape for shape in shapes if len(shape) == 3]
    if len(result) == 2 and len(matrices) == 1 and len(stacks) == 1:
        return Product(2 * result[0] * math.prod(stacks[0][1:]), result[0])
    if len(result) == 3 and len(matrices) == 2:
        # each of them has the rows and one of the widths
        rows = math.isqrt(math.prod(sum(matrices, ())) // math.prod(result[1:]))
        return Product(2 * rows * math.prod(result[1:]), rows)
    return None


def _convolution(instruction: Instruction) -> int:
    """Counted as XLA does: pairs of positions that meet, of each axis of the window.

    XLA also writes axes of a batch as an axis of the window, most of whose pairs meet padding.
    """
    lhs, rhs = instruction.operands[:2]
    result = instruction.results[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.name
    inputs, kernel, outputs = labels.groups()
    flops = 2 * result.shape[outputs.index("b")] * result.shape[outputs.index("f")]
    flops *= rhs.shape[kernel.index("i")]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    for axis in range(len(inputs) - 2):
        spatial = str(axis)
        flops *= _pairs(
            lhs.shape[inputs.index(spatial)],
            rhs.shape[kernel.index(spatial)],
            result.shape[outputs.index(spatial)],
            _window(window[1] if window else "", axis),
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return flops // (int(groups[1]) if groups else 1)


def _window(text: str, axis: int) -> dict[str, int]:
    """Stride, padding before the first position, and dilations of an axis of a window."""
    fields = dict(field.split("=") for field in text.split())

    def of(name: str, default: str) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    return {
        "stride": int(of("stride", "1")),
        "pad": int(of("pad", "0_0").split("_")[0]),
        "lhs_dilate": int(of("lhs_dilate", "1")),
        "rhs_dilate": int(of("rhs_dilate", "1")),
    }


def _pairs(size: int, kernel: int, outputs: int, window: dict[str, int]) -> int:
    """How many pairs of a kernel's and an output's position meet an input."""
    count = 0
    for k in range(kernel):
        for o in range(outputs):
            place = o * window["stride"] - window["pad"] + k * window["rhs_dilate"]
            inside, rest = divmod(place, window["lhs_dilate"])
            count += rest == 0 and 0 <= inside < size
    return count


def is_dense_expert_work(instruction: Instruction, experts: int, widths: tuple[int, int]) -> bool:
    """Whether a product multiplies rows with every expert's weight.

    XLA writes such a product with an axis of experts beside both widths, or as one product that
    sums over experts and a width together.

    Args:
      instruction: A product, no kernel for rows in groups.
      experts: Their number.
      widths: Of their weights.
    """
    arrays = (*instruction.operands, *instruction.results)
    if any({experts, *widths} <= set(array.shape) for array in arrays):
        return True
    axes = instruction.numbers("lhs_contracting_dims")
    summed = math.prod(instruction.operands[0].shape[axis] for axis in axes)
    return summed in {experts * width for width in widths}
