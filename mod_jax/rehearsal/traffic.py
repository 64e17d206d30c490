"""Bytes that the instructions of a compiled program read from and write to the device's memory.

Each operand is read once and each result written once, without the padding of layouts. What a
fusion keeps inside counts nothing, nor does what lies in the memory of the chip itself. Of an array
that is only sliced the slice counts, of one that is updated in place the update. Kernels count by
their arguments too, so those that read one several times count too little.
"""

from mod_jax.rehearsal.program import Array, Instruction, Program

# They make no new array, or their bodies are counted.
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
    "async-start",
    "async-update",
    "async-done",
)
SLICES = ("dynamic-slice", "slice", "gather")
SAME = ("bitcast", "reshape", "copy", "convert")
OPERAND_IN_RESULTS = ("all-gather-start", "collective-permute-start", "copy-start")


class Traffic:
    """Bytes of each instruction of a program.

    Args:
      program: The program.
      on_chip: Whether only memory 0 is the device's main memory, as for TPUs.
    """

    def __init__(self, program: Program, on_chip: bool):
        self._program = program
        self._on_chip = on_chip

    def of(self, computation: str, instruction: Instruction) -> float:
        """Bytes that one run of an instruction reads and writes."""
        opcode = instruction.opcode
        if computation in self._program.fused or opcode in FREE or opcode.endswith("-done"):
            return 0.0
        if opcode == "fusion":
            (called,) = [name for _, name in instruction.calls()]
            if called in self._program.continued:
                return self._beside(instruction)
            read = sum(
                self._read(called, number, array)
                for number, array in enumerate(instruction.operands)
            )
            return read + self._written(called, instruction)
        if opcode in SLICES:
            return 2 * self._sum(instruction.results)
        if opcode == "slice-start":  # its results are the operand, the slice and a context
            (_, part, *_), (source, *_) = instruction.results, instruction.operands
            return part.size * (self._is_main(source) + self._is_main(part))
        if opcode == "dynamic-update-slice":
            return 2 * self._sum(instruction.operands[1:2])
        if opcode == "scatter":
            return 3 * self._sum(instruction.operands[-1:])
        read, written = self._sum(instruction.operands), self._sum(instruction.results)
        if opcode in OPERAND_IN_RESULTS:
            written -= read
        return read + max(0.0, written)

    def _beside(self, fusion: Instruction) -> float:
        """Bytes of a fusion beside a collective, whose arrays pass through it untouched."""
        passed = fusion.aliases
        read = [array for n, array in enumerate(fusion.operands) if n not in passed.values()]
        written = [array for n, array in enumerate(fusion.results) if n not in passed]
        return self._sum((*read, *written))

    def _sum(self, arrays: tuple[Array, ...]) -> float:
        return sum(array.size for array in arrays if self._is_main(array))

    def _is_main(self, array: Array) -> bool:
        return not (self._on_chip and array.space)

    def _read(self, computation: str, number: int, array: Array) -> float:
        """Bytes that a fusion reads of its operand of this number."""
        whole = self._sum((array,))
        instructions = self._program.computations[computation]
        (parameter,) = [
            instruction
            for instruction in instructions
            if instruction.opcode == "parameter" and instruction.arguments == str(number)
        ]
        found, queue = 0.0, [parameter.name]
        for name in queue:  # grows
            for user in instructions:
                if name not in user.reads:
                    continue
                first = user.reads[0] == name
                if user.opcode == "bitcast":
                    queue.append(user.name)
                elif user.opcode == "fusion":
                    (called,) = [inner for _, inner in user.calls()]
                    found += self._read(called, user.reads.index(name), array)
                elif first and user.opcode in SLICES:
                    found += sum(result.size for result in user.results)
                elif not (first and user.opcode == "dynamic-update-slice"):
                    return whole
        return min(found, whole)

    def _written(self, computation: str, fusion: Instruction) -> float:
        """Bytes that a fusion writes."""
        made = {made.name: made for made in self._program.computations[computation]}
        root = list(made.values())[-1]
        roots = [made[name] for name in root.reads] if root.opcode == "tuple" else [root]
        if len(roots) != len(fusion.results):
            return self._sum(fusion.results)
        return sum(
            min(self._sum((array,)), self._update(made, root) or array.size)
            for array, root in zip(fusion.results, roots)
        )

    def _update(self, made: dict[str, Instruction], root: Instruction) -> float:
        """Bytes of an update in place of a fusion's operand; 0 if the fusion makes a new array."""
        while root.opcode in SAME:
            root = made[root.reads[0]]
        if root.opcode != "dynamic-update-slice":
            return 0.0
        updated = made[root.reads[0]]
        while updated.opcode in SAME:
            updated = made[updated.reads[0]]
        return root.operands[1].size if updated.opcode == "parameter" else 0.0
