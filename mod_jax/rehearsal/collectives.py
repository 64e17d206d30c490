"""What the devices of a compiled program send to each other, and why.

Bytes are those that one device sends, by the arithmetic of rings: of n devices, an all-gather of
parts of b bytes sends (n - 1) b, a reduce-scatter and an all-to-all of b bytes (n - 1) / n b, an
all-reduce twice that. On a torus a message passes other chips on its way; that is not counted. An
exchange of ragged rows counts as if they were spread evenly.

The program for several slices is that of one of them. What crosses the network between them is
written as a message to the host, which says what it is for.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from mod_jax.rehearsal.groups import axes_of, groups_of, pairs_of
from mod_jax.rehearsal.places import Places
from mod_jax.rehearsal.program import Instruction, Program

_ACROSS = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
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
      kind: One of `KINDS`, or what goes over the network in the same words.
      axes: Axes of the mesh that it goes over.
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
    devices = math.prod(mesh.values()) // slices
    for computation, instruction, times in program.located_runs(trips):
        kind = instruction.opcode.removesuffix("-start")
        across = _ACROSS.search(instruction.attributes) if kind == "send" else None
        if not times or (kind not in KINDS and not across) or computation in program.continued:
            continue
        if across:
            kind = across[1].lower().replace("_", "-")
            sizes = [array.size for array in instruction.operands[:1]]
            axes, share, joined = tuple(mesh)[:1], 1.0, slices
        else:
            groups, share = _groups(instruction, devices)
            axes, joined = axes_of(groups, mesh), groups.shape[1]
            sizes = _sizes(instruction, kind)
        kind = "reduce-scatter" if computation in scattering else kind
        for index, size in enumerate(sizes if axes else ()):
            sent = share * _sent(kind, size, joined)
            module = places.of_operand(computation, instruction, index)
            over = (0.0, sent) if across else (sent, 0.0)
            yield Collective(instruction.name, kind, axes, module, *over, times)


def _groups(instruction: Instruction, devices: int) -> tuple[np.ndarray, float]:
    """The groups of a collective, and the share of the devices that send."""
    if not instruction.opcode.startswith("collective-permute"):
        return groups_of(instruction, devices), 1.0
    pairs = [pair for pair in pairs_of(instruction) if pair[0] != pair[1]]
    return (np.array(pairs) if pairs else np.zeros((1, 1), int)), len(pairs) / devices


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


def _sent(kind: str, size: float, devices: int) -> float:
    """Bytes that each device of a ring sends."""
    if kind.startswith(("collective-", "one-to-one")):
        return size
    if kind == "all-gather":
        return (devices - 1) * size
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices * size
