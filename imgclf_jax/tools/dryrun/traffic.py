"""Memory traffic of a compiled program, counted from its HLO text.

Each instruction, possibly a fusion, reads its operands and writes its results. On-chip memory is free, and of a sliced
array only the slice counts. A loop counts as often as it runs, or once if its trip count is unknown, as for the loop
over steps. XLA's own cost analysis differs: it counts loops once, includes on-chip memory, and omits library kernels
such as cuDNN's.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
          "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions without memory traffic.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
         "opt-barrier", "domain", "add-dependency"}  # fmt: skip
_BUFFERS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")  # custom calls that do nothing
_LIBRARIES = ("__cudnn", "__cublas")  # their last result is a workspace

_HEAD = re.compile(r"(?:ENTRY )?%([\w.\-]+) \(")
_LINE = re.compile(r"(?:ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{[^}]*\}|(?:true|false)_computation=%[\w.\-]+")
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Array:
    """One array of a result."""

    bytes: int
    on_chip: bool  # in a TPU's vector or scalar memory rather than HBM

    @property
    def traffic(self) -> int:
        """The bytes of memory traffic to read or write it."""
        return 0 if self.on_chip else self.bytes


@dataclass(frozen=True)
class Instruction:
    """One line of HLO text."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # its results
    operands: tuple[str, ...]
    text: str  # the text after the operands
    argument: str  # the text in place of operands: a parameter's number, a constant's value


@dataclass
class Computation:
    """The instructions of a computation by name, and the name of its root."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    root_name: str = ""

    @property
    def root(self) -> Instruction:
        """The instruction that computes the result."""
        return self.instructions[self.root_name]


class Module:
    """A parsed HLO module."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in text.splitlines():
            if line.startswith("}"):
                current = None
            elif current is None and (head := _HEAD.match(line)):
                current = self.computations.setdefault(head[1], Computation())
                self.entry = head[1] if line.startswith("ENTRY") else self.entry
            elif current is not None and (instruction := _parse(line.strip())):
                current.instructions[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    current.root_name = instruction.name

    def traffic(self) -> int:
        """Bytes read and written in all."""
        return self._sum(self.entry, self._of_instruction)

    def collectives(self) -> dict[str, tuple[int, int]]:
        """Returns (count, bytes of the results) by kind."""
        found = {kind: (self._sum_of_kind(kind, lambda _: 1), self._sum_of_kind(kind, _result)) for kind in COLLECTIVES}
        return {kind: (count, size) for kind, (count, size) in found.items() if count}

    def _sum_of_kind(self, kind: str, value: Callable[[Instruction], int]) -> int:
        return self._sum(self.entry, lambda _, i: value(i) if i.opcode in (kind, f"{kind}-start") else 0)

    def _sum(self, name: str, value: Callable[[Computation, Instruction], int]) -> int:
        """Sums `value` over all executed instructions, with loops unrolled and the costliest branch taken."""
        computation, total = self.computations[name], 0
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                total += self.trips(instruction) * self._sum(_called(instruction), value)
            elif instruction.opcode == "conditional":
                total += max(self._sum(branch, value) for branch in _branches(instruction))
            elif instruction.opcode in ("call", "async-start") or self._wraps(instruction):
                total += self._sum(_called(instruction), value)
            else:
                total += value(computation, instruction)
        return total

    def _wraps(self, instruction: Instruction) -> bool:
        """Whether the instruction asynchronously starts a called computation, as `fusion-start` does."""
        return instruction.opcode.endswith("-start") and "calls=" in instruction.text

    def trips(self, loop: Instruction) -> int:
        """Returns the trip count of a loop, or 1 if unknown; counters that end at a constant start at 0."""
        if match := _TRIPS.search(loop.text):
            return int(match[1])
        match = _CONDITION.search(loop.text)
        if not match:
            return 1
        condition = self.computations[match[1]]
        compared = condition.root if condition.root.opcode == "compare" else None
        if compared is None or "direction=LT" not in compared.text:
            return 1
        last = condition.instructions[compared.operands[-1]]
        return int(last.argument) if last.opcode == "constant" and last.argument.isdigit() else 1

    def _of_instruction(self, computation: Computation, i: Instruction) -> int:
        """Returns the bytes that one instruction reads and writes."""
        if i.opcode in _FREE or i.opcode.endswith("-done") or any(f'"{name}"' in i.text for name in _BUFFERS):
            return 0
        read = sum(self._read(computation, i, n) for n in range(len(i.operands)))
        if i.opcode == "copy-start" or i.opcode.removesuffix("-start") in COLLECTIVES:
            return read + _result(i, traffic=True)
        return read + (self._written(i) if i.opcode == "fusion" else _written_by(computation, i))

    def _read(self, computation: Computation, i: Instruction, n: int) -> int:
        """Returns the bytes that an instruction reads of its operand `n`."""
        operand = computation.instructions.get(i.operands[n])
        whole = sum(a.traffic for a in operand.arrays) if operand else 0
        if not whole:
            return 0
        if n == 0 and i.opcode in ("dynamic-slice", "slice", "gather"):
            return min(whole, sum(a.bytes for a in i.arrays))
        if n == 0 and i.opcode in ("dynamic-update-slice", "scatter"):
            return 0  # in place
        if i.opcode != "fusion":
            return whole
        return min(whole, self._read_inside(self.computations[_called(i)], n, whole))

    def _read_inside(self, fused: Computation, n: int, whole: int) -> int:
        """Returns the bytes that a fused computation reads of its parameter `n` of `whole` bytes."""
        names = {i.name for i in fused.instructions.values() if i.opcode == "parameter" and i.argument == str(n)}
        total = 0
        for user in fused.instructions.values():
            for place, name in enumerate(user.operands):
                if name not in names:
                    continue
                if user.opcode == "bitcast":
                    names.add(user.name)
                elif place == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
                    total += sum(a.bytes for a in user.arrays)
                elif place == 0 and user.opcode in ("dynamic-update-slice", "scatter"):
                    continue
                elif user.opcode == "fusion":
                    total += self._read_inside(self.computations[_called(user)], place, whole)
                else:
                    return whole
        return whole if fused.root.name in names else total

    def _written(self, i: Instruction) -> int:
        """Returns the bytes that a fusion writes: for an in-place update, only the update."""
        fused = self.computations[_called(i)]
        root = fused.root
        names = root.operands if root.opcode == "tuple" and len(root.operands) == len(i.arrays) else (root.name,)
        total = 0
        for name, array in zip(names, i.arrays, strict=False):
            inner = fused.instructions.get(name)
            while inner is not None and inner.opcode == "bitcast":
                inner = fused.instructions.get(inner.operands[0])
            if inner is not None and inner.opcode in ("dynamic-update-slice", "scatter") and not array.on_chip:
                total += _updated(fused, inner)
            else:
                total += array.traffic
        return total


def _written_by(computation: Computation, i: Instruction) -> int:
    if i.opcode in ("dynamic-update-slice", "scatter"):
        return 0 if i.arrays[0].on_chip else _updated(computation, i)
    arrays = i.arrays[:-1] if len(i.arrays) > 1 and any(f'"{name}' in i.text for name in _LIBRARIES) else i.arrays
    return sum(a.traffic for a in arrays)


def _updated(computation: Computation, i: Instruction) -> int:
    """Returns the bytes of an in-place update."""
    update = computation.instructions.get(i.operands[1 if i.opcode == "dynamic-update-slice" else -1])
    return sum(a.bytes for a in update.arrays) if update else 0


def _result(i: Instruction, traffic: bool = False) -> int:
    """Returns the bytes of the results, without the operands and contexts that asynchronous starts also return."""
    arrays, n = i.arrays, len(i.operands)
    if i.opcode == "copy-start":
        arrays = arrays[:1]
    elif i.opcode.endswith("-start") and len(arrays) >= 2 * n:
        arrays = arrays[n : 2 * n]
    return sum(a.traffic if traffic else a.bytes for a in arrays)


def _called(i: Instruction) -> str:
    match = _CALLED.search(i.text)
    return match[1] if match else ""


def _branches(i: Instruction) -> list[str]:
    return [name for match in _BRANCHES.finditer(i.text) for name in _NAME.findall(match[0])]


def _parse(line: str) -> Instruction | None:
    head = _LINE.match(line)
    if not head:
        return None
    start = head.end()
    end = _close(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    result, rest = line[start:end], line[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _close(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    return Instruction(
        head[1], opcode, tuple(_arrays(result)), tuple(_NAME.findall(inside)), rest[close + 1 :], inside.strip()
    )


def _close(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _arrays(result: str) -> Iterator[Array]:
    for dtype, shape, layout in _ARRAY.findall(result):
        size = _BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)
        yield Array(size, re.search(r"T\(.*S\([1-9]", layout) is not None)
