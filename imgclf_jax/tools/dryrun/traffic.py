"""What a compiled program reads and writes of a chip's memory, counted in its HLO text, instruction by instruction.

An instruction, which may be many fused ones, reads its operands and writes its results; what lies in a chip's on-chip
memory does not count. Of an array of which a slice is used, the slice counts. A loop counts as often as it runs where
that is known, a loop over steps, whose length is an argument, once. That is what XLA's own cost analysis does as well,
but for loops, which it counts once, on-chip memory, which it counts like any other, and kernels of libraries such as
cuDNN, which it leaves out.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
          "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# What only names arrays that are there already.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
         "opt-barrier", "domain", "add-dependency"}  # fmt: skip
_BUFFERS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")  # custom calls that do nothing
_LIBRARIES = ("__cudnn", "__cublas")  # whose last result is their workspace

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
    on_chip: bool  # in TPU's vector or scalar memory, and not in that which `bandwidth` is of

    @property
    def traffic(self) -> int:
        """Bytes of the chip's memory that to read or write it takes."""
        return 0 if self.on_chip else self.bytes


@dataclass(frozen=True)
class Instruction:
    """One line of HLO text."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # its results
    operands: tuple[str, ...]
    text: str  # what comes after the operands
    argument: str  # what stands in the place of operands: a parameter's number, a constant's value


@dataclass
class Computation:
    """The instructions of a computation, by name, and the name of that which gives its result."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    root_name: str = ""

    @property
    def root(self) -> Instruction:
        """What gives the result."""
        return self.instructions[self.root_name]


class Module:
    """A compiled program's text."""

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
        """Kind → (how many, bytes of their results)."""
        found = {}
        for kind in COLLECTIVES:
            if count := self._sum(self.entry, partial(_if_of, kind, _one)):
                found[kind] = count, self._sum(self.entry, partial(_if_of, kind, _result))
        return found

    def _sum(self, name: str, of: Callable[[Computation, Instruction], int]) -> int:
        """The sum of `of` over all instructions that run, each as often as it does."""
        computation, total = self.computations[name], 0
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                total += self.trips(instruction) * self._sum(_called(instruction), of)
            elif instruction.opcode == "conditional":
                total += max(self._sum(branch, of) for branch in _branches(instruction))
            elif instruction.opcode in ("call", "async-start") or self._wraps(instruction):
                total += self._sum(_called(instruction), of)
            else:
                total += of(computation, instruction)
        return total

    def _wraps(self, instruction: Instruction) -> bool:
        """Whether it starts, by itself, a computation of one instruction, as `fusion-start` does."""
        return instruction.opcode.endswith("-start") and "calls=" in instruction.text

    def trips(self, loop: Instruction) -> int:
        """How often the body of a loop runs; 1 where it is not known. One that counts up to a constant begins at 0."""
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
        """Bytes that one instruction reads and writes."""
        if i.opcode in _FREE or i.opcode.endswith("-done") or any(f'"{name}"' in i.text for name in _BUFFERS):
            return 0
        if i.opcode == "copy-start" or i.opcode.removesuffix("-start") in COLLECTIVES:
            return sum(self._read(computation, i, n) for n in range(len(i.operands))) + _result(i, traffic=True)
        read = sum(self._read(computation, i, n) for n in range(len(i.operands)))
        return read + (self._written(i) if i.opcode == "fusion" else _written_by(computation, i))

    def _read(self, computation: Computation, i: Instruction, n: int) -> int:
        """Bytes that an instruction reads of its operand `n`."""
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
        """Bytes that a fused computation reads of its parameter `n`, which has `whole`."""
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
        """Bytes that a fusion writes: of an array that is updated in place, the update."""
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
    """Bytes of what is written into the first operand."""
    update = computation.instructions.get(i.operands[1 if i.opcode == "dynamic-update-slice" else -1])
    return sum(a.bytes for a in update.arrays) if update else 0


def _if_of(kind: str, of: Callable[[Instruction], int], _: Computation, i: Instruction) -> int:
    return of(i) if i.opcode in (kind, f"{kind}-start") else 0


def _one(_: Instruction) -> int:
    return 1


def _result(i: Instruction, traffic: bool = False) -> int:
    """Bytes of the results. What starts an asynchronous operation may give its operands, too, and contexts."""
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
    """Where the parenthesis that opens at `start` closes."""
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
