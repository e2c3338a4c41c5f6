"""Unpickles PyTorch's checkpoints without running them: tensors come out as descriptions, containers as they are.

A pickle is a program, and may be written to harm. It may call functions: here only those of a table. It may also ask
for much memory or time in a few bytes: by a memo with billions of places, by copies of copies, by keys whose hash takes
for ever. So it is run by Python's own unpickler written in Python, whose memo is a dict; only by the instructions that
plain data need; and every copy is counted.
"""

import collections
import io
import pickle
from collections.abc import Callable, Collection
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

MOST_BYTES = 4 << 20  # of a pickle; a ResNet-152 has 0.1 MB. An instruction of one byte takes up to 224 in memory.
_MOST_AXES, _MOST_ARGUMENTS = 32, 16
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
# What pickling writes for plain data, for names of classes, and for calls. NEWOBJ, INST, EXT1, … are not among them.
_INSTRUCTIONS = """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
    FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES
    SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT
    SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL
    STACK_GLOBAL REDUCE BUILD BINPERSID""".split()  # noqa: SIM905


class Refused(Exception):
    """A file is of a kind, or asks for a function, that is not allowed. The text says which."""


class Storage(NamedTuple):
    """The name in the file, and the type, of the numbers that tensors are views of."""

    key: str
    dtype: np.dtype


class Tensor(NamedTuple):
    """A view of a storage; the offset and the strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Stream(io.BytesIO):
    """Bytes that raise EOFError where they end too early, which the unpickler would pass over."""

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


def load(stream: Stream) -> tuple[Any, dict[str, np.dtype]]:
    """What the pickle at the beginning of the stream holds, and the types of the storages that it names, by key.

    Raises Refused for a function that is not allowed, and for damage errors of many types.
    """
    unpickler = _Unpickler(stream)
    return unpickler.load(), unpickler.dtypes


def _plain(key: Any) -> bool:
    """Whether a key of a dict is of a kind whose hash is quick, and unlike others'."""
    if isinstance(key, tuple):
        return len(key) <= _MOST_ARGUMENTS and not any(isinstance(k, tuple) for k in key) and all(map(_plain, key))
    return (type(key) is int and abs(key) < 2**60) or isinstance(key, (str, bytes, bool, float, type(None)))


def _check_keys(keys: Collection[Any]) -> None:
    if not all(map(_plain, keys)):
        raise ValueError("a key that is no plain value")


class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: Stream):
        super().__init__(stream)
        names: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): lambda *pairs: self._copied(collections.OrderedDict, *pairs),
            ("torch", "Size"): lambda *sizes: self._copied(tuple, *sizes),
            ("torch", "device"): lambda *place: place,
            ("torch._utils", "_rebuild_tensor"): lambda *tensor: _tensor(*tensor),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *tensor: _tensor(*tensor[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        names |= {("torch", name): name for name in (*_STORAGES, *_DTYPES)}
        for kind in (dict, list, tuple, set):
            for module in ("builtins", "__builtin__"):
                names[module, kind.__name__] = lambda *items, kind=kind: self._copied(kind, *items)
        self._names = names
        self._left = len(stream.getbuffer())  # how many elements may be copied: each was once in the pickle
        self.dtypes: dict[str, np.dtype] = {}

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as e:
            raise ValueError(f"an unknown instruction or name, {e}"[:100]) from e

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            text = f"{module[:100]}.{name[:100]}"
            raise Refused(f"asks for {text if text.isprintable() else ascii(text)}")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6):
            raise ValueError("a storage of another form")
        kind, name, key, _, _, *view = pid  # the two left out are the device and the number of elements
        if kind != "storage" or not isinstance(name, str) or not isinstance(key, str) or view not in ([], [None]):
            raise ValueError("a storage of another form")  # only the oldest have storages that are part of another
        self.dtypes[key] = np.dtype(_STORAGES[name])
        return Storage(key, self.dtypes[key])

    def _copied(self, kind: Callable[..., Any], *arguments: Any) -> Any:
        items = arguments[0] if arguments else ()
        if len(arguments) > 1 or not isinstance(items, (dict, list, tuple, set)):
            raise ValueError("a container of another form")
        self._left -= len(items)
        if self._left < 0:
            raise ValueError("it copies what it holds again and again")
        if kind is set:
            _check_keys(items)
        elif kind in (dict, collections.OrderedDict):
            _check_keys([pair if isinstance(items, dict) else pair[0] for pair in items])
        return kind(items)

    # The instructions of which the plain unpickler does more than plain data need. `dispatch` is how it finds them.

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        if type(arguments) is not tuple or len(arguments) > _MOST_ARGUMENTS or not callable(self.stack[-1]):
            raise ValueError("a call of another form")
        self.stack[-1] = self.stack[-1](*arguments)

    def _build(self) -> None:
        self.stack.pop()  # attributes, such as the versions of a state dict's modules: not needed
        if not isinstance(self.stack[-1], dict):
            raise ValueError("attributes of what has none")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[Any] | None = None) -> None:
        items = self.pop_mark() if items is None else items
        if not isinstance(self.stack[-1], dict):
            raise ValueError("items of what is no dict")
        self.stack[-1].update(self._dict_of(items))

    def _dict(self) -> None:
        items = self._dict_of(self.pop_mark())
        self.append(items)

    def _dict_of(self, items: list[Any]) -> dict[Any, Any]:
        _check_keys(items[::2])
        return dict(zip(items[::2], items[1::2], strict=True))

    def _add_items(self) -> None:
        items = self.pop_mark()
        _check_keys(items)
        self.stack[-1].update(items)

    def _frozenset(self) -> None:
        items = self.pop_mark()
        _check_keys(items)
        self.append(frozenset(items))

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **{getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _INSTRUCTIONS},
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _add_items,
        pickle.FROZENSET[0]: _frozenset,
    }


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    for sizes in (shape, strides):
        if not isinstance(sizes, (tuple, list)) or len(sizes) != len(shape) or len(sizes) > _MOST_AXES:
            raise ValueError("a tensor of no valid shape")
    if not all(type(n) is int and 0 <= n < 2**60 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor of no valid shape")
    return Tensor(storage, offset, tuple(shape), tuple(strides))
