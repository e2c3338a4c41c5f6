"""Reads the pickles in PyTorch checkpoints without running code: tensors come out as descriptions, containers as is.

A pickle is a program. A hostile one can call functions, allocate terabytes, copy copies, or use keys whose hash takes
forever, all in a few bytes. So `_Unpickler` is the standard library's, reduced to the opcodes of plain data: it calls
only the functions of a table, accepts only short keys, and counts what calls copy. It is the Python class, since the C
one allocates its memo by the largest index in the file.
"""

import collections
import io
import pickle
import re
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from imgclf_jax.core import internals
from imgclf_jax.core.typing import Function

_MAX_AXES = 32
MAX_BYTES = 4 << 20  # of a pickle; a ResNet-152 has 0.1 MB
# The names of a dtype in PyTorch, of its storage there, and in safetensors; the dtype.
DTYPES = (
    ("float64", "DoubleStorage", "F64", np.dtype("<f8")),
    ("float32", "FloatStorage", "F32", np.dtype("<f4")),
    ("float16", "HalfStorage", "F16", np.dtype("<f2")),
    ("bfloat16", "BFloat16Storage", "BF16", np.dtype(ml_dtypes.bfloat16)),
    ("int64", "LongStorage", "I64", np.dtype("<i8")),
    ("int32", "IntStorage", "I32", np.dtype("<i4")),
    ("int16", "ShortStorage", "I16", np.dtype("<i2")),
    ("int8", "CharStorage", "I8", np.dtype("i1")),
    ("uint8", "ByteStorage", "U8", np.dtype("u1")),
    ("bool", "BoolStorage", "BOOL", np.dtype("?")),
    # Those without a storage of their own: their bytes are in an untyped one.
    ("float8_e4m3fn", "", "F8_E4M3", np.dtype(ml_dtypes.float8_e4m3fn)),
    ("float8_e5m2", "", "F8_E5M2", np.dtype(ml_dtypes.float8_e5m2)),
    ("uint16", "", "U16", np.dtype("<u2")),
)
_DTYPES = {name: dtype for name, _, _, dtype in DTYPES}
_OPCODES = {
    getattr(pickle, name)[0]
    for name in """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
    FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES
    SHORT_BINBYTES BINBYTES8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT APPEND APPENDS GLOBAL
    STACK_GLOBAL BINPERSID PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET""".split()  # noqa: SIM905
}


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


type Unpickled = Any  # plain containers, numbers and texts, Tensor and Storage, as the file has them


def load(file: io.BytesIO) -> tuple[Unpickled, dict[str, np.dtype]]:
    """Reads one pickle: (its value, the dtype of each storage by key).

    Raises Refused for a function that is not allowed, and errors of many types for damage.
    """
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.dtypes


def _tensor(storage: Unpickled, offset: Unpickled, shape: Unpickled, strides: Unpickled, *_: Unpickled) -> Tensor:
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise ValueError("a malformed tensor")
    if not all(type(n) is int and 0 <= n < 2**60 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor of no valid shape")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


# What training scripts save beside weights: it is neither made nor called, but comes out as None.
_IGNORED = re.compile(
    r"argparse\.Namespace|datetime\.datetime|pathlib\.(_local\.)?\w+Path|_codecs\.encode|numpy\.(dtype|ndarray)|"
    r"numpy\._?core\.multiarray\.(scalar|_reconstruct)|"
    r"(builtins|__builtin__)\.(bool|bytearray|complex|dict|float|frozenset|int|list|set|slice|str|tuple)"
)

# What a pickle may name. The types of storages are NumPy's dtypes here, and dtypes their names.
_FUNCTIONS: dict[str, Function | np.dtype | str] = {
    "collections.OrderedDict": lambda pairs=(): collections.OrderedDict((_key(key), value) for key, value in pairs),
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda *_: {},
    "torch.Size": lambda *sizes: tuple(*sizes),
    "torch.device": lambda *device: device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": lambda storage, *view: _tensor(storage._replace(dtype=_DTYPES[view[5]]), *view),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.storage.UntypedStorage": np.dtype("u1"),
    **{f"torch.{storage}": dtype for _, storage, _, dtype in DTYPES},
    **{f"torch.{name}": name for name in _DTYPES},
}


def _key(key: Unpickled) -> str | int:
    """Returns a key that is hashed fast and unlikely to collide on purpose. Raises ValueError for any other."""
    if not isinstance(key, str) and not (type(key) is int and abs(key) < 2**60):
        raise ValueError("a key that is neither a text nor a number")
    return key


class _Unpickler(internals.PythonUnpickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.dtypes: dict[str, np.dtype] = {}
        self._left = file.getbuffer().nbytes  # elements that calls may still copy: each was in the pickle once

    def find_class(self, module: str, name: str) -> Unpickled:
        text = f"{module}.{name}"
        found = _FUNCTIONS.get(text, (lambda *_: None) if _IGNORED.fullmatch(text) else None)
        if found is not None:
            return found
        if not self.read(1):
            raise EOFError("it ends within a name")
        raise Refused(f"asks for {text[:200] if text.isprintable() else ascii(text)[:200]}")

    def persistent_load(self, pid: Unpickled) -> Storage:
        kind, dtype, key, _, _, *view = pid  # ignored: the device and the number of elements
        if type(kind) is not str or not isinstance(dtype, np.dtype) or type(key) is not str or any(view):
            raise ValueError("a malformed storage")  # only the oldest files have views of storages
        self.dtypes[key] = dtype
        return Storage(key, dtype)

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self._left -= 1 + len(arguments) + sum(len(x) for x in arguments if isinstance(x, list | tuple | dict))
        if self._left < 0:
            raise ValueError("it copies what it holds again and again")
        self.stack[-1] = self.stack[-1](*arguments)

    def _build(self) -> None:
        """Drops the attributes of a state dict, such as the versions of its modules, or of an ignored object."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict | None):
            raise ValueError("attributes of something else than a dict")

    def _set_items(self, items: list[Unpickled]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError("items of something else than a dict")
        self.stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))

    dispatch: ClassVar = {
        **{code: run for code, run in internals.PythonUnpickler.dispatch.items() if code in _OPCODES},
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: lambda self: self._set_items([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._set_items(self.pop_mark()),
    }
