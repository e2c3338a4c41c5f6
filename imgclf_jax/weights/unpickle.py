"""Reads the pickles in PyTorch checkpoints without executing them: tensors come out as descriptions, containers as is.

A pickle is a program, and a hostile one can call functions, allocate a memo of billions of entries, copy copies, or use
keys whose hash takes forever, all in a few bytes. So this module interprets the opcodes that `pickletools.genops` (the
standard library's disassembler) yields: it knows only those that plain data need, calls only a table of functions,
keeps the memo in a dict, and counts every copied element.
"""

import collections
import io
import pickletools
from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from imgclf_jax.core.typing import Function

MAX_BYTES = 4 << 20  # of a pickle; a ResNet-152 has 0.1 MB. An opcode of one byte takes up to 224 in memory.
_MAX_AXES, _MAX_ARGUMENTS = 32, 16
_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# Opcodes that push their own argument.
_ARGUMENTS = """INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8""".split()  # noqa: SIM905
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Refused(Exception):
    """A file has a format, or asks for a function, that is not allowed. The text says which."""


class Storage(NamedTuple):
    """The name in the file, and the dtype, of the buffer that tensors are views of."""

    key: str
    dtype: np.dtype


class Tensor(NamedTuple):
    """A view of a storage; the offset and the strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Stream(io.BytesIO):
    """Bytes that raise EOFError when a read reaches beyond their end."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size is not None and len(data) < size:
            raise EOFError("it ends too early")
        return data

    def readline(self, size: int | None = -1, /) -> bytes:
        data = super().readline(size)
        if not data.endswith(b"\n"):
            raise EOFError("it ends too early")
        return data


type Unpickled = Any  # plain containers, numbers and texts, Tensor and Storage, as the file has them


def load(stream: Stream) -> tuple[Unpickled, dict[str, np.dtype]]:
    """Reads one pickle from the stream: (its value, the dtype of each storage by key).

    Raises Refused for a function that is not allowed, and errors of many types for damage.
    """
    machine = _Machine(len(stream.getbuffer()))
    return machine.run(stream), machine.dtypes


class _Machine:
    """The pickle machine: a stack, the stacks below each mark, and the memo."""

    def __init__(self, length: int):
        self.dtypes: dict[str, np.dtype] = {}
        self._stack: list[Unpickled] = []
        self._below: list[list[Unpickled]] = []
        self._memo: dict[int, Unpickled] = {}
        self._left = length  # elements that calls may still copy: each was in the pickle once
        self._functions: dict[str, Function | str] = {
            "collections OrderedDict": lambda *pairs: self._copy(collections.OrderedDict, *pairs),
            "torch Size": lambda *sizes: self._copy(tuple, *sizes),
            "torch device": lambda *device: device,
            "torch._utils _rebuild_tensor": lambda *tensor: _tensor(*tensor),
            "torch._utils _rebuild_tensor_v2": lambda *tensor: _tensor(*tensor[:4]),
            "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
        }
        self._functions |= {f"torch {name}": name for name in (*_STORAGES, *_DTYPES)}
        for kind in (dict, list, tuple, set):
            for module in ("builtins", "__builtin__"):
                self._functions[f"{module} {kind.__name__}"] = lambda *items, kind=kind: self._copy(kind, *items)

    def run(self, stream: Stream) -> Unpickled:
        """Interprets opcodes up to STOP, and returns the top of the stack."""
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name in _ARGUMENTS:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self._stack.append(_EMPTY[name]())
            elif name in _TUPLES:
                self._stack.append(tuple(self._pop(_TUPLES[name])))
            elif name == "FRAME" and int(argument or 0) > len(stream.getbuffer()) - stream.tell():
                raise EOFError("it ends too early")
            elif name not in ("PROTO", "FRAME", "STOP"):
                self._step(name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Unpickled) -> None:
        stack, memo = self._stack, self._memo
        match name:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                if argument not in memo:
                    raise ValueError(f"no memo entry {argument}"[:100])
                stack.append(memo[argument])
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "POP_MARK":
                self._pop_mark()
            case "POP":
                stack.pop() if stack else self._pop_mark()
            case "TUPLE":
                row = tuple(self._pop_mark())
                self._stack.append(row)
            case "LIST":
                listed = self._pop_mark()
                self._stack.append(listed)
            case "DICT":
                entries = _entries(self._pop_mark())
                self._stack.append(entries)
            case "FROZENSET":
                frozen = frozenset(_keys(self._pop_mark()))
                self._stack.append(frozen)
            case "APPEND":
                (item,) = self._pop(1)
                self._top(list).append(item)
            case "APPENDS":
                items = self._pop_mark()
                self._top(list).extend(items)
            case "SETITEM":
                pair = _entries(self._pop(2))
                self._top(dict).update(pair)
            case "SETITEMS":
                entries = _entries(self._pop_mark())
                self._top(dict).update(entries)
            case "ADDITEMS":
                keys = _keys(self._pop_mark())
                self._top(set).update(keys)
            case "GLOBAL":
                stack.append(self._find(argument))
            case "STACK_GLOBAL":
                module, function = self._pop(2)
                stack.append(self._find(f"{module} {function}"))
            case "REDUCE":
                (arguments,) = self._pop(1)
                if type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS or not callable(stack[-1]):
                    raise ValueError("a malformed call")
                stack[-1] = stack[-1](*arguments)
            case "BUILD":  # attributes, such as the versions of a state dict's modules: not needed
                stack.pop()
                self._top(dict)
            case "BINPERSID":
                stack[-1] = self._storage(stack[-1])
            case _:
                raise ValueError(f"an unknown opcode, {name}")

    def _pop(self, count: int) -> list[Unpickled]:
        if len(self._stack) < count:
            raise IndexError("an empty stack")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_mark(self) -> list[Unpickled]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _top(self, kind: type) -> Unpickled:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"contents of a {kind.__name__} for something else")
        return self._stack[-1]

    def _find(self, name: str) -> Function | str:
        if name not in self._functions:
            text = name.replace(" ", ".", 1)[:200]
            raise Refused(f"asks for {text if text.isprintable() else ascii(text)}")
        return self._functions[name]

    def _storage(self, pid: Unpickled) -> Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6):
            raise ValueError("a malformed storage")
        kind, name, key, _, _, *view = pid  # ignored: the device and the number of elements
        if kind != "storage" or not isinstance(name, str) or not isinstance(key, str) or view not in ([], [None]):
            raise ValueError("a malformed storage")  # only the oldest files have views of storages
        if name not in _STORAGES:
            raise ValueError("a storage of an unknown type")
        self.dtypes[key] = np.dtype(_STORAGES[name])
        return Storage(key, self.dtypes[key])

    def _copy(self, kind: Function, *arguments: Unpickled) -> Unpickled:
        items = arguments[0] if arguments else ()
        if len(arguments) > 1 or not isinstance(items, (dict, list, tuple, set)):
            raise ValueError("a malformed container")
        self._left -= len(items)
        if self._left < 0:
            raise ValueError("it copies what it holds again and again")
        if kind is set:
            _keys(items)
        elif kind in (dict, collections.OrderedDict):
            _keys(pair if isinstance(items, dict) else pair[0] for pair in items)
        return kind(items)


def _is_plain(key: object) -> bool:
    """Whether hashing a key is fast and unlikely to collide on purpose."""
    if isinstance(key, tuple):
        return len(key) <= _MAX_ARGUMENTS and not any(isinstance(k, tuple) for k in key) and all(map(_is_plain, key))
    return (type(key) is int and abs(key) < 2**60) or isinstance(key, (str, bytes, bool, float, type(None)))


def _keys[T: Iterable[object]](keys: T) -> T:
    if not all(map(_is_plain, keys)):
        raise ValueError("a key that is no plain value")
    return keys


def _entries(items: list[Unpickled]) -> dict[Unpickled, Unpickled]:
    return dict(zip(_keys(items[::2]), items[1::2], strict=True))


def _tensor(storage: Unpickled, offset: Unpickled, shape: Unpickled, strides: Unpickled) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    for sizes in (shape, strides):
        if not isinstance(sizes, (tuple, list)) or len(sizes) != len(shape) or len(sizes) > _MAX_AXES:
            raise ValueError("a tensor of no valid shape")
    if not all(type(n) is int and 0 <= n < 2**60 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor of no valid shape")
    return Tensor(storage, offset, tuple(shape), tuple(strides))
