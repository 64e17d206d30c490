"""The devices that a collective joins, from the three forms of `replica_groups` in HLO.

    {{0,1},{2,3}}                          the groups themselves
    [2,4]<=[4,2]T(1,0)                     2 groups of 4: numbers 0..7 as [4,2], transposed, in rows
    mesh['a'=4,'b'=2] {'b'}                a mesh of 0..7, groups along some of its axes
    mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
                                           the same of numbers that are transposed first
    mesh['a'=8] {'a':(2)4}                 along a part of an axis: as [2,4,1] the second

Numbers count the devices of the program's mesh in its flat order.
"""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from mod_jax.rehearsal.program import Instruction

_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def groups_of(instruction: Instruction, devices: int) -> np.ndarray:
    """The groups of a collective.

    Args:
      instruction: The collective.
      devices: Number of devices of the program.

    Returns:
      i[groups, devices of a group].

    Raises:
      ValueError: If they are written in a form that is not known.
    """
    found = re.search(r"\breplica_groups=(.*)", instruction.attributes)
    if not found:
        return np.arange(devices)[None]
    text = found[1]
    if text.startswith("{"):
        listed = text[: text.find("}}") + 2 if text.startswith("{{") else 2]
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed)]
        return np.array(groups) if groups else np.arange(devices)[None]
    if iota := _IOTA.match(text):
        return _ordered(iota[2], iota[3]).reshape(_numbers(iota[1]))
    if mesh := _MESH.match(text):
        return _along(*mesh.groups())
    raise ValueError(f"%{instruction.name}: replica_groups={text[:80]}: a form that is not known")


def pairs_of(instruction: Instruction) -> list[tuple[int, int]]:
    """(sender, receiver) of a collective-permute."""
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
    pairs = re.findall(r"\{(\d+),(\d+)", found[1] + "}") if found else []
    return [(int(sender), int(receiver)) for sender, receiver in pairs]


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the mesh's axes along which the devices of a group differ.

    Args:
      groups: From `groups_of`.
      mesh: Name -> size of each axis.
    """
    places = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places) if (place != place[:, :1]).any())


def _along(axes: str, order: str | None, chosen: str) -> np.ndarray:
    """Groups along the chosen axes of a mesh."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if order:
        ordered = _ORDER.match(order)
        numbers = _ordered(*ordered.groups()) if ordered else np.array(_numbers(order))
    parts = {name: [(size, False)] for name, size in sizes.items()}  # (size, whether chosen)
    for name, before, size in _AXIS.findall(chosen):
        if not before:
            parts[name] = [(sizes[name], True)]
            continue
        cut = int(before) * int(size)
        parts[name] = _cut(parts[name], sizes[name], int(before), cut)
    shape = [size for cuts in parts.values() for size, _ in cuts]
    marks = [mark for cuts in parts.values() for _, mark in cuts]
    along = [axis for axis, mark in enumerate(marks) if mark]
    across = [axis for axis, mark in enumerate(marks) if not mark]
    size = math.prod(shape[axis] for axis in along)
    return numbers.reshape(shape).transpose(across + along).reshape(-1, size)


def _cut(
    parts: list[tuple[int, bool]], whole: int, first: int, last: int
) -> list[tuple[int, bool]]:
    """Marks the positions first..last of an axis, in products of sizes from its front."""
    edges = {1, whole, first, last}
    chosen = {(first, last)}
    front = 1
    for size, mark in parts:
        chosen |= {(front, front * size)} if mark else set()
        edges |= {front, front * size}
        front *= size
    ordered = sorted(edges)
    return [
        (end // start, any(low <= start and end <= high for low, high in chosen))
        for start, end in itertools.pairwise(ordered)
    ]


def _ordered(shape: str, axes: str | None) -> np.ndarray:
    """0, 1, 2, ... in a shape, transposed, then flat."""
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (numbers.transpose(_numbers(axes)) if axes else numbers).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
