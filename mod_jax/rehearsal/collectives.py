"""What the devices of a compiled program send to each other, and why.

Bytes are those that one device sends, by the arithmetic of rings: of n devices, an all-gather of
parts of b bytes sends (n - 1) b, a reduce-scatter and an all-to-all of b bytes (n - 1) / n b, an
all-reduce twice that. On a torus a message passes other chips on its way; that is not counted. An
exchange of ragged rows counts as if they were spread evenly.

A group that spans several slices sends within each slice first: only the rest crosses the network.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from mod_jax.rehearsal.groups import axes_of, groups_of, pairs_of
from mod_jax.rehearsal.places import Places
from mod_jax.rehearsal.program import Instruction, Program

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a collective moves.

    Attributes:
      name: Of the instruction.
      kind: One of `KINDS`.
      axes: Axes of the mesh that it goes over, () if it moves nothing.
      module: Where it comes from, as `places.Places` says.
      links: Bytes that a device sends over the links of its slice in one run.
      network: Bytes that a device sends to other slices in one run.
      times: How often it runs.
    """

    name: str
    kind: str
    axes: tuple[str, ...]
    module: str
    links: float
    network: float
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return (self.links + self.network) * self.times


def collectives(
    program: Program,
    mesh: Mapping[str, int],
    trips: Callable[[Instruction], int] | None = None,
    slices: int = 1,
) -> Iterator[Collective]:
    """All collectives that move something, an array each.

    Args:
      program: The program of one device.
      mesh: Name -> size of each axis, the first one the slowest.
      trips: As for `Program.runs`.
      slices: Number of slices, which the first axis of the mesh spans.
    """
    places = Places(program)
    scattering = _scattering(program)
    devices = int(np.prod(list(mesh.values())))
    for computation, instruction, times in program.located_runs(trips):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if kind == "collective-permute":
            pairs = [pair for pair in pairs_of(instruction) if pair[0] != pair[1]]
            groups = np.array(pairs) if pairs else np.zeros((1, 1), int)
        else:
            groups = groups_of(instruction, devices)
        axes = axes_of(groups, mesh)
        if not axes or not times:
            continue
        kind = "reduce-scatter" if computation in scattering else kind
        share = len(groups) / devices if kind == "collective-permute" else 1
        for index, size in enumerate(_sizes(instruction, kind)):
            links, network = _bytes(kind, size * share, *_spanned(groups, devices, slices))
            module = places.of_operand(computation, instruction, index)
            yield Collective(instruction.name, kind, axes, module, links, network, times)


def _scattering(program: Program) -> set[str]:
    """Computations of the fusions that XLA makes of an all-reduce of which a part is used."""
    return {
        called
        for instructions in program.computations.values()
        for instruction in instructions
        if re.match(r"all-reduce-scatter", instruction.name) and instruction.opcode == "fusion"
        for _, called in instruction.calls()
    }


def _sizes(instruction: Instruction, kind: str) -> list[float]:
    """Bytes of each array that is sent; others are offsets, or buffers to receive into."""
    operands = instruction.operands
    return [array.size for array in (operands[:1] if kind == "ragged-all-to-all" else operands)]


def _spanned(groups: np.ndarray, devices: int, slices: int) -> tuple[int, int]:
    """(devices of a group within a slice, slices of a group)."""
    of_slice = groups // (devices // slices)
    spanned = len(set(of_slice[0].tolist()))
    return groups.shape[1] // spanned, spanned


def _bytes(kind: str, size: float, inner: int, slices: int) -> tuple[float, float]:
    """(bytes over links, bytes over the network) that a device sends of an array."""
    if kind in ("collective-permute", "collective-broadcast"):
        return (size, 0.0) if slices == 1 else (0.0, size)
    if kind == "all-gather":
        return _ring(kind, size * slices, inner), _ring(kind, size, slices)
    if kind.endswith("all-to-all"):
        return _ring(kind, size / slices, inner), _ring(kind, size, slices)
    return _ring(kind, size, inner), _ring(kind, size / inner, slices)


def _ring(kind: str, size: float, devices: int) -> float:
    """Bytes that each device of a ring sends."""
    if kind == "all-gather":
        return (devices - 1) * size
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices * size
