"""How often the loops run whose number depends on data, for which a program's text has no number.

There are two kinds: the loss goes through the positions that it reads, and experts exchange rows in
further rounds if one of them gets more than its share. Rows are taken to be spread evenly.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from mod_jax.config import ModelConfig
from mod_jax.rehearsal import products
from mod_jax.rehearsal.program import Instruction, Program

LOSSES = {"mimic", "preference", "next_token", "pair_means"}  # scopes
UNEVEN = "later_rounds"  # scope of the rounds that an even routing does not need


class Work(NamedTuple):
    """What one device has to do in one micro-batch.

    Attributes:
      words: Rows of the head that it holds.
      read: Positions that the loss reads.
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
    return Work(student.decoder.vocab_size // mesh["tensor"], read, tokens * choices)


def trips(work: Work, program: Program) -> Callable[[Instruction], int]:
    """A function for `Program.runs`.

    It raises ValueError for a loop that is neither of the loss nor of the experts. On CPUs, where
    nothing but tests is rehearsed, losses and products of experts have loops of other kinds, which
    count once.
    """

    def rounds(loop: Instruction) -> int:
        scopes = set(re.findall(r"\w+", loop.op_name))
        if UNEVEN in scopes:
            return 0
        if scopes & LOSSES:
            chunk = _chunk(program, loop, work.words)
            return -(-work.read // chunk) if chunk else 1
        if "experts" in scopes:
            return 1
        raise ValueError(
            f"{loop.op_name or loop.name}: expected a loop of the loss or of the experts, as no "
            "other depends on data"
        )

    return rounds


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
