"""How often the loops run whose number depends on data, for which a program's text has no number.

There are three kinds: the loss goes through the positions that it reads, the products of experts on
CPU through the rows that arrived, and their exchange through the rows that its first round has no
room for. Rows are taken to be spread evenly over experts, so of the last there are none.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax.sharding import AbstractMesh

from mod_jax.config import ModelConfig
from mod_jax.ops.embedding import TABLE_AXES
from mod_jax.rehearsal import products
from mod_jax.rehearsal.program import Instruction, Program
from mod_jax.sharding import ROWS, mesh_axes, partition, ways

LOSSES = {"mimic", "preference", "next_token", "pair_means"}  # scopes


class Work(NamedTuple):
    """What one device has to do in one micro-batch.

    Attributes:
      words: Rows of the head that it holds.
      read: Positions of which the loss reads these words: those of all devices that share it out.
      routed: Pairs of a position and its expert that it computes.
    """

    words: int
    read: int
    routed: float

    def filled(self, rows: int) -> float:
        """Share of the rows of a grouped product that hold something."""
        return min(1.0, self.routed / rows)


def work_of(student: ModelConfig, mesh: Mapping[str, int], read: int, tokens: int) -> Work:
    """The work of a device.

    Args:
      student: Its configuration.
      mesh: Name -> size of each axis.
      read: Positions of a device's rows that the loss reads.
      tokens: Positions of a device's rows that are no padding.
    """
    moe = student.decoder.moe
    choices = moe.experts_per_token if moe else 0
    words = student.decoder.vocab_size
    sizes = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    slices = mesh_axes(partition(sizes, (words,), TABLE_AXES[:1])[0])
    readers = tuple(axis for axis in slices if axis in ROWS)
    return Work(words // ways(sizes, slices), read * ways(sizes, readers), tokens * choices)


def trips(work: Work, program: Program) -> Callable[[Instruction], int]:
    """A function for `Program.runs`.

    It raises ValueError for a loop that is neither of the loss nor of the experts.
    """

    def rounds(loop: Instruction) -> int:
        scopes = set(re.findall(r"\w+", loop.op_name))
        if "later_rounds" in scopes:
            return 0  # the first round, which is in no loop, has room for an even routing
        if "experts" in scopes:
            return _rounds(work.routed, _rows(program, loop))
        if scopes & LOSSES:
            return _rounds(work.read, _chunk(program, loop, work.words))
        raise ValueError(
            f"{loop.op_name or loop.name}: expected a loop of the loss or of the experts, as no "
            "other depends on data"
        )

    return rounds


def _rounds(of: float, each: int) -> int:
    return max(1, math.ceil(of / each)) if each else 1


def _chunk(program: Program, loop: Instruction, words: int) -> int:
    """Positions whose logits a turn of the loss makes."""
    return max(
        (
            math.prod(array.shape) // words
            for instruction in program.under(loop)
            if products.product(instruction)
            for array in instruction.results
            if words in array.shape
        ),
        default=0,
    )


def _rows(program: Program, loop: Instruction) -> int:
    """Rows that the grouped products of a turn take."""
    found = map(products.product, program.under(loop))
    return max((product.rows for product in found if product), default=0)
