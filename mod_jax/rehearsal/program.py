"""Reads a compiled program: what runs, how often, in which arrays.

The source is the text of the optimised program (`jax.stages.Compiled.as_text`), as XLA's own cost
analysis counts the body of a loop once. The text's grammar is that of HLO: computations of one
instruction a line, each with its shape, operation, operands and attributes.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

_HEAD = re.compile(r"(ENTRY )?%([^ ]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([^ ]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^}]*?S\((\d+)\)[^}]*\})?")
_CALLS = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|true_computation|false_computation"
    r"|called_computations)=\{?(%[^,{} ]+(?:, %[^,{} ]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
DONE = "async-collective-done"  # how TPU programs call the end of a collective
_COMMENT = re.compile(r"/\*.*?\*/")


class Array(NamedTuple):
    """An array.

    Attributes:
      dtype: In the words of HLO: "bf16", "s32".
      shape: Its shape.
      space: Number of the memory that it lies in; 0 is the device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> float:
        """Bytes, without the padding of its layout."""
        bits = re.search(r"\d+", self.dtype)
        widths = {"pred": 8, "token": 0, "opaque": 0}
        return math.prod(self.shape) * (int(bits[0]) if bits else widths[self.dtype]) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
      name: Its name in the program.
      opcode: What it does: "dot", "fusion", "while".
      results: Arrays that it returns; several for a tuple.
      operands: Arrays that it reads, those of a tuple included.
      arguments: Text of the operands: names, or the number of a constant.
      attributes: The rest of its line.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[Array, ...]
    arguments: str
    attributes: str

    @property
    def op_name(self) -> str:
        """Where it comes from: the names of scopes and of the JAX operation, or ""."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Of a custom call: what is called; else ""."""
        found = re.search(r'custom_call_target="([^"]+)"', self.attributes)
        return found[1] if found else ""

    @property
    def index(self) -> int | None:
        """Of a get-tuple-element: the number of the array that it takes; else None."""
        found = re.search(r"\bindex=(\d+)", self.attributes)
        return int(found[1]) if found and self.opcode == "get-tuple-element" else None

    @property
    def aliases(self) -> dict[int, int]:
        """Number of a result -> number of the operand whose memory it takes, as a fusion says."""
        found = re.findall(r"\{(\d*)\}: \((\d+), \{\}", self.attributes)
        return {int(result or 0): int(operand) for result, operand in found}

    @property
    def reads(self) -> list[str]:
        """Names of its operands."""
        return re.findall(r"%([^,() ]+)", self.arguments)

    def calls(self) -> Iterator[tuple[str, str]]:
        """(as what, name) of the computations that it calls.

        The end of an asynchronous operation names what its beginning has run.
        """
        if self.opcode in ("async-update", "async-done"):
            return
        for role, names in _CALLS.findall(self.attributes):
            for name in names.split(", "):
                yield role, name.removeprefix("%")

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """An attribute such as lhs_contracting_dims={1,2}; () if it is missing."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(map(int, found[1].split(","))) if found and found[1] else ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      entry: Name of the computation that runs first.
      computations: Name -> instructions.
    """

    entry: str
    computations: Mapping[str, tuple[Instruction, ...]]

    def runs(
        self, trips: Callable[[Instruction], int] | None = None
    ) -> Iterator[tuple[Instruction, int]]:
        """(instruction, how often it runs in a call of the program), for all that run.

        Of a conditional every branch counts, as the text does not say which one is taken.

        Args:
          trips: Loop -> how often its body runs, asked for loops whose number XLA does not know.

        Raises:
          ValueError: For such a loop without `trips`.
        """
        for _, instruction, count in self.located_runs(trips):
            yield instruction, count

    def located_runs(
        self, trips: Callable[[Instruction], int] | None = None
    ) -> Iterator[tuple[str, Instruction, int]]:
        """As `runs`, with the name of the computation before each instruction."""
        times = collections.Counter({self.entry: 1})
        for name in self._callers_first:
            for instruction in self.computations[name]:
                yield name, instruction, times[name]
                for role, called in instruction.calls():
                    count = self._trips(instruction, trips) if role == "body" else 1
                    times[called] += count * times[name]

    def _trips(self, loop: Instruction, trips: Callable[[Instruction], int] | None) -> int:
        """How often the body of a loop runs."""
        known = _TRIPS.search(loop.attributes)
        count = int(known[1]) if known else self._counted(loop)
        if count is None and trips is None:
            raise ValueError(f"%{loop.name}: how often this loop runs is known at run time only")
        return trips(loop) if count is None and trips else count or 0

    def _counted(self, loop: Instruction) -> int | None:
        """Rounds of a loop that counts from 0 up to a constant, in steps of a constant; or None."""
        called = dict(loop.calls())
        condition = {i.name: i for i in self.computations[called["condition"]]}
        body = {i.name: i for i in self.computations[called["body"]]}
        compare, root = list(condition.values())[-1], list(body.values())[-1]
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        counter, limit = (condition[name] for name in compare.reads)
        place = re.search(r"index=(\d+)", counter.attributes)
        if limit.opcode != "constant" or place is None:
            return None
        added = body[root.reads[int(place[1])]]
        while added.opcode in ("copy", "bitcast"):
            added = body[added.reads[0]]
        steps = [body[name] for name in added.reads if body[name].opcode == "constant"]
        if added.opcode != "add" or len(steps) != 1:
            return None
        return -(-int(limit.arguments) // int(steps[0].arguments))

    @functools.cached_property
    def _callers_first(self) -> list[str]:
        """Names of the computations that run, each after all those that call it."""
        order: list[str] = []
        seen = set()

        def visit(name: str) -> None:
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for instruction in self.computations[name]:
                for _, called in instruction.calls():
                    visit(called)
            order.append(name)

        visit(self.entry)
        return order[::-1]

    def under(self, loop: Instruction) -> Iterator[Instruction]:
        """The instructions that the body of a loop runs, those of what it calls included."""
        names = [name for role, name in loop.calls() if role == "body"]
        for name in names:  # grows
            for instruction in self.computations.get(name, ()):
                yield instruction
                names += [called for _, called in instruction.calls() if called not in names]

    @functools.cached_property
    def fused(self) -> set[str]:
        """Names of the computations within a fusion or an operation, whose arrays are not stored.

        Those of calls, loops, branches and asynchronous operations are none of them.
        """
        return {
            called
            for name in self._callers_first
            for instruction in self.computations[name]
            for role, called in instruction.calls()
            if role in ("calls", "to_apply") and instruction.opcode not in ("call", "async-start")
        }

    @functools.cached_property
    def continued(self) -> set[str]:
        """Names of the fused computations in which a collective goes on that began elsewhere.

        On TPUs a collective may run beside several fusions, each of which holds it as well: it
        begins in one that is named async-collective-start, and ends in async-collective-done.
        """
        return {
            called
            for name in self._callers_first
            for instruction in self.computations[name]
            if instruction.opcode == "fusion"
            for _, called in instruction.calls()
            if called.startswith("async_collective_fusion") or instruction.name.startswith(DONE)
        }

    def arrays(self) -> Iterator[tuple[Array, Instruction]]:
        """(array, instruction that makes it) for all arrays that lie in memory.

        What a fusion makes inside does not: only its results are written.
        """
        for name in self._callers_first:
            if name not in self.fused:
                for instruction in self.computations[name]:
                    for array in instruction.results:
                        yield array, instruction


def read(text: str) -> Program:
    """Reads the text of an optimised program."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, lines = "", "", list[str]()
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif line == "}":
            computations[name] = _computation(lines)
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:  # the text of a kernel's attributes may have several lines
            lines[-1] += line
    return Program(entry, computations)


def _computation(lines: list[str]) -> tuple[Instruction, ...]:
    results: dict[str, tuple[Array, ...]] = {}
    found = []
    for line in lines:
        head = _INSTRUCTION.match(line)
        assert head is not None, line
        shape, rest = _until(_COMMENT.sub("", line[head.end() :]), " ")
        opcode, rest = rest.lstrip().split("(", 1)
        operands, attributes = _until("(" + rest, ")")
        results[head[1]] = _arrays(shape)
        read = [results.get(name, ()) for name in re.findall(r"%([^,() ]+)", operands)]
        found.append(
            Instruction(
                head[1], opcode, results[head[1]], sum(read, ()), operands[1:-1], attributes
            )
        )
    return tuple(found)


def _until(text: str, end: str) -> tuple[str, str]:
    """Splits after the first `end` that no parenthesis, bracket or brace encloses."""
    depth = 0
    for place, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if depth == 0 and letter == end:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size), int(space or 0))
        for dtype, sizes, space in _ARRAY.findall(shape)
    )
