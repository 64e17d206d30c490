"""What lies in a device's memory during a step, and what a compiler says that refuses one."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mod_jax.rehearsal.hardware import GIB
from mod_jax.rehearsal.places import UNNAMED, place_of
from mod_jax.rehearsal.program import Program
from mod_jax.rehearsal.step import Prepared
from mod_jax.sharding import row_sharding

LARGEST = 8  # arrays that are listed
TEMPORARIES = "activations and temporaries"
UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Buffer(NamedTuple):
    """An array of a program.

    Attributes:
      size: Bytes.
      shape: As HLO writes it: "bf16[8,2048,896]".
      place: Module that it comes from.
    """

    size: float
    shape: str
    place: str


class Memory(NamedTuple):
    """Memory of one device.

    Attributes:
      needed: Bytes at the peak of a step.
      parts: Part -> bytes, which sum to `needed`.
      largest: The largest arrays that the step makes, or of which the compiler says that they do
        not fit.
    """

    needed: float
    parts: Mapping[str, float]
    largest: tuple[Buffer, ...]


def memory_of(
    compiled: jax.stages.Compiled, program: Program, prepared: Prepared, mesh: Mesh
) -> Memory:
    """The memory of a compiled step."""
    analysis: Any = compiled.memory_analysis()
    needed, inputs = analysis.peak_memory_in_bytes, analysis.argument_size_in_bytes
    parts = read_by(prepared, mesh)
    parts["padding of these"] = inputs - sum(parts.values())
    parts[TEMPORARIES] = needed - inputs
    return Memory(needed, parts, _largest(program))


def read_by(prepared: Prepared, mesh: Mesh) -> dict[str, float]:
    """Part -> bytes that one device holds of what a step reads, without the padding of layouts."""
    state, frozen = prepared.program.state, prepared.program.frozen
    return {
        "weights that train": _held(prepared.state.params, state.params),
        "optimizer": _held(prepared.state.optimizer, state.optimizer),
        "frozen weights": _held(prepared.frozen.student, frozen.student),
        "teacher": _held(prepared.frozen.teacher, frozen.teacher),
        "batch": _held(prepared.batch, row_sharding(mesh)),
    }


def _held(arrays: Any, shardings: Any) -> float:
    """Bytes that one device holds of a tree of arrays."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, arrays)
    sizes = jax.tree.map(
        lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize,
        arrays,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def _largest(program: Program) -> tuple[Buffer, ...]:
    """The largest arrays that instructions make, each shape and place once."""
    found = set()
    for array, instruction in program.arrays():
        if instruction.opcode in ("parameter", "tuple", "get-tuple-element", "bitcast", "while"):
            continue
        shape = f"{array.dtype}[{','.join(map(str, array.shape))}]"
        found.add(Buffer(array.size, shape, str(place_of(instruction.op_name) or UNNAMED)))
    return tuple(sorted(found, reverse=True)[:LARGEST])


def refused(error: str, read: Mapping[str, float]) -> Memory | None:
    """What an out-of-memory error of the TPU compiler says; None for other errors.

    Args:
      error: Its text. What the error calls temporaries includes what the step reads.
      read: From `read_by`.
    """
    used = re.search(r"Used ([\d.]+)([BKMGT]) of", error) or re.search(
        r"Ran out of memory on HBM, .* \(([\d.]+)([BKMGT])\) exceeds", error
    )
    if not used:
        return None
    buffers = []
    for block in error.split("Size: ")[1:]:
        size = re.match(r"([\d.]+)([BKMGT])", block)
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", block)
        name = re.search(r'op_name="([^"]*)"', block)
        if size and shape:
            place = place_of(name[1]) if name else None
            buffers.append(Buffer(_bytes(*size.groups()), shape[1], str(place or UNNAMED)))
    buffers.sort(reverse=True)
    needed = _bytes(used[1], used[2])
    parts = {**read, TEMPORARIES: needed - sum(read.values())}
    return Memory(needed, parts, tuple(buffers[:LARGEST]))


def _bytes(number: str, unit: str) -> float:
    return float(number) * UNITS[unit]


def gib(size: float) -> str:
    """Text of a number of bytes."""
    return f"{size / GIB:.2f} GiB"
