"""The module of the model that an instruction of a compiled program belongs to.

JAX writes the scopes of `jax.named_scope` into the name of an operation. What the compiler makes
itself often has none: then the arrays that it comes from and goes to are followed until one has.
"""

import collections
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from mod_jax.rehearsal.program import DONE, Instruction, Program

UNNAMED = "unnamed"
FAR = 400  # instructions that are looked at around one without a name

# Scope -> name in a report; the first that an operation's name holds decides.
WHOLE = {
    "optimizer": "optimizer",
    "vision_tower": "vision tower",
    "mimic": "loss",
    "preference": "loss",
    "next_token": "loss",
}
PARTS = {
    "balance": "router",
    "router": "router",
    "experts": "experts",
    "attention": "attention",
    "mlp": "mlp",
    "embedding": "embedding",
    "adaptor": "adaptor",
    "final_norm": "final norm",
}
MODELS = ("student", "teacher")


class Place(NamedTuple):
    """Where an operation comes from.

    Attributes:
      module: "vision tower", "student experts", "teacher attention", "loss", "optimizer", ...
      backward: "gradient", "recomputed" or "" of the forward pass.
      exact: Whether the name says the part of a model, and not the model alone.
    """

    module: str
    backward: str
    exact: bool

    def __str__(self) -> str:
        return f"{self.module}, {self.backward}" if self.backward else self.module


def place_of(op_name: str) -> Place | None:
    """The place in a name such as "jit(train_step)/jvp(student)/while/body/attention/dot"."""
    words = set(re.findall(r"\w+", op_name))
    backward = "gradient" if "transpose(" in op_name else ""
    if "rematted_computation" in words:
        backward = "recomputed"
    for scope, name in WHOLE.items():
        if scope in words:
            return Place(name, backward, True)
    part = next((name for scope, name in PARTS.items() if scope in words), "")
    model = next((model for model in MODELS if model in words), "")
    if not part and not model:
        return Place("loss", backward, True) if "pair_means" in words else None
    return Place(f"{model} {part}".strip(), backward, bool(part))


class Places:
    """Places of the arrays that instructions of a program read and make."""

    def __init__(self, program: Program):
        self._program = program
        self._caller: dict[str, Instruction] = {}
        self._inside: dict[str, str] = {}  # computation -> the computation of its caller
        self._users: dict[str, dict[str, list[Instruction]]] = {}
        self._made: dict[str, dict[str, Instruction]] = {}
        for name, instructions in program.computations.items():
            users = collections.defaultdict(list)
            for instruction in instructions:
                for read in instruction.reads:
                    users[read].append(instruction)
                for _, called in instruction.calls():
                    self._caller[called] = instruction
                    self._inside[called] = name
            self._users[name] = users
            self._made[name] = {instruction.name: instruction for instruction in instructions}

    def of_operand(self, computation: str, instruction: Instruction, index: int) -> str:
        """Place of an operand of an instruction, and of what becomes of it; `UNNAMED` without.

        Without a name of its own, what makes an array decides before what uses it: a gradient goes
        to the optimizer, which is not where it comes from. A weight that is gathered comes from
        nowhere.
        """
        made, users = self._made[computation], self._users[computation]
        reads = instruction.reads
        caller = self._caller.get(computation)
        named = place_of(instruction.op_name)
        if named and named.exact and len(reads) == 1:
            return str(named)
        if caller and caller.opcode in ("fusion", "async-start"):  # which surround it alone
            operand = made[reads[index]]
            number = int(operand.arguments) if operand.opcode == "parameter" else 0
            return self.of_operand(self._inside[computation], caller, number)

        def before(at: Instruction) -> Iterable[Instruction]:
            return [made[name] for name in at.reads if name in made]

        def after(at: Instruction) -> Iterable[Instruction]:
            passed = at.aliases if self._beside(at) else None
            return [user for user in users[at.name] if passed is None or user.index in passed]

        first = [made[name] for name in reads[index : index + 1] if name in made]
        results = [
            user
            for user in self._results(users, instruction)
            if len(reads) == 1 or user.index == index
        ]
        found = [
            *_near(first, before, self._of_what_passes),
            *_near(results, after, self._of_what_passes),
            named,
            *self._callers(computation),
        ]
        places = [place for place in found if place is not None]
        return str(next((p for p in places if p.exact), next(iter(places), UNNAMED)))

    def of(self, computation: str, instruction: Instruction) -> str:
        """Place of an instruction by its name or by what it calls, or of the loop around it."""
        places = [self._place(instruction), *self._callers(computation)]
        return str(next((place for place in places if place is not None), UNNAMED))

    def _results(
        self, users: dict[str, list[Instruction]], instruction: Instruction
    ) -> list[Instruction]:
        """Users of a result, behind the end of an asynchronous operation."""
        found = users[instruction.name]
        ends = [user for user in found if user.opcode.endswith("-done")]
        return [user for end in ends for user in users[end.name]] if ends else found

    def _beside(self, instruction: Instruction) -> bool:
        """Whether a fusion only runs beside a collective whose arrays pass through it."""
        return (
            instruction.opcode == "fusion"
            and not instruction.name.startswith(DONE)
            and any(called in self._program.continued for _, called in instruction.calls())
        )

    def _of_what_passes(self, instruction: Instruction) -> Place | None:
        return None if self._beside(instruction) else self._place(instruction)

    def _place(self, instruction: Instruction) -> Place | None:
        """By its own name, or by the last that has one within a fusion."""
        own = place_of(instruction.op_name)
        if (own and own.exact) or instruction.opcode != "fusion":
            return own
        inside = [
            place
            for _, called in instruction.calls()
            for inner in reversed(self._program.computations[called])
            if (place := place_of(inner.op_name))
        ]
        return next((place for place in inside if place.exact), own or next(iter(inside), None))

    def _callers(self, computation: str) -> Iterator[Place | None]:
        while computation in self._caller:
            yield place_of(self._caller[computation].op_name)
            computation = self._inside[computation]


def _near(
    start: list[Instruction],
    step: Callable[[Instruction], Iterable[Instruction]],
    place: Callable[[Instruction], Place | None],
) -> Iterator[Place | None]:
    """Places of instructions, the nearest first."""
    seen = {instruction.name for instruction in start}
    queue = collections.deque(start)
    for _ in range(FAR):
        if not queue:
            return
        instruction = queue.popleft()
        yield place(instruction)
        if instruction.opcode in ("while", "parameter", "conditional"):
            continue
        for following in step(instruction):
            if following.name not in seen:
                seen.add(following.name)
                queue.append(following)
