"""Reads weights from safetensors and PyTorch files, without PyTorch and without running code from the file.

A PyTorch checkpoint is a pickle, and a pickle is a program: it can call any function by name. Here it may call only the
few functions that rebuild tensors and plain containers. Any other name is refused before anything is called.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from imgclf_jax.core.errors import UserError, reason

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first numbers of checkpoints before PyTorch 1.6
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
_SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_CONTAINERS = ("state_dict", "model", "model_state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile and Lightning put them before names


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # the offset and the strides count elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: Path) -> dict[str, np.ndarray]:
    """{name: array} of a safetensors file or of a PyTorch checkpoint, in its old or its new format.

    The content decides which format it is. The weights may be the whole content or lie under `state_dict`, `model`,
    `model_state_dict` or `net`. A prefix that all names share (`module.`, `_orig_mod.`, `model.`) is removed. The
    arrays are read-only and have the dtype of the file. Raises UserError for a file that is damaged, of another kind,
    or that would run code.
    """
    content = path.read_bytes()
    try:
        if content.startswith(b"PK\3\4"):
            named = _take_weights(*_read_zip(content), path)
        elif content.startswith(pickle.dumps(_MAGIC, 2)):
            named = _take_weights(*_read_legacy(content), path)
        elif path.suffix == ".safetensors":
            named = _read_safetensors(content)
        else:
            named = None
    except _Refused as e:
        raise UserError(
            f"{path} {e}, which weights do not need; nothing of it was run; save the weights by "
            "torch.save(model.state_dict(), FILE) or as safetensors"
        ) from e
    except UserError:
        raise
    except Exception as e:  # damage can surface as nearly any error of pickle, zipfile, NumPy and safetensors
        raise UserError(f"{path} is damaged or cut short ({reason(e)}); download it again") from e
    if named is None:
        pointer = content.startswith(b"version https://git-lfs")
        what = "is a Git LFS pointer and not the file itself; run git lfs pull" if pointer else (
            "is neither a PyTorch checkpoint (.pth, .pt, .th) nor a .safetensors file")  # fmt: skip
        raise UserError(f"{path} {what}")
    for prefix in _PREFIXES:
        if named and all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): array for name, array in named.items()}
    return named


class _Refused(Exception):
    """A file is of a kind, or asks for a function, that is not allowed. The text says which."""


class _Unpickler(pickle.Unpickler):
    """Rebuilds plain containers, and tensors as `_Tensor`. A pickle can call only what `find_class` returns.

    These functions are immutable or made anew for each file, so that no file can change what the next file gets.
    """

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        names: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
            ("torch", "device"): lambda *place: place,
            ("torch._utils", "_rebuild_tensor"): lambda *tensor: _tensor(*tensor),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *tensor: _tensor(*tensor[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        names |= {("torch", name): name for name in (*_STORAGES, *_DTYPES)}
        for module in ("builtins", "__builtin__"):
            names |= {(module, kind.__name__): kind for kind in (dict, list, tuple, set)}
        self._names = names
        self.dtypes: dict[str, np.dtype] = {}  # of the storages, by key

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise _Refused(f"asks for {module}.{name}")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, _, _, *view = pid  # the two left out are the device and the number of elements
        if kind != "storage" or name not in _STORAGES or view not in ([], [None]):
            raise ValueError(f"{pid!r} is no storage")  # only the oldest files have storages that are part of another
        self.dtypes[key] = np.dtype(_STORAGES[name])
        return _Storage(key, self.dtypes[key])


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


Storages = Callable[[str, np.dtype], np.ndarray]  # (key, dtype) → the elements of a storage, [n]


def _read_zip(content: bytes) -> tuple[Any, Storages]:
    """PyTorch's format from 1.6 on: a zip archive with a folder that holds `data.pkl` and a file for each storage."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = archive.namelist()
    pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or any("/code/" in name for name in names):
        raise _Refused("is a TorchScript program" if pickles else "is a zip archive of something else")
    folder = pickles[0].removesuffix("data.pkl")
    _check_order(f"{folder}byteorder" not in names or archive.read(f"{folder}byteorder") == b"little")

    def storage(key: str, dtype: np.dtype) -> np.ndarray:
        return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype)

    return _Unpickler(io.BytesIO(archive.read(pickles[0]))).load(), storage


def _read_legacy(content: bytes) -> tuple[Any, Storages]:
    """The older format: five pickles (magic number, version, machine, content, storage keys), then the storages."""
    file = io.BytesIO(content)
    magic, protocol, machine = (_Unpickler(file).load() for _ in range(3))
    if (magic, protocol) != (_MAGIC, _PROTOCOL):
        raise ValueError(f"version {protocol}")
    _check_order(machine["little_endian"])
    unpickler = _Unpickler(file)
    tree, keys = unpickler.load(), _Unpickler(file).load()
    places = {}
    for key in keys:
        length = int.from_bytes(file.read(8), "little")
        places[key] = length, file.tell()
        file.seek(length * unpickler.dtypes[key].itemsize, io.SEEK_CUR)
    return tree, lambda key, dtype: np.frombuffer(content, dtype, *places[key])


def _check_order(little: bool) -> None:
    if not little:
        raise ValueError("its numbers are big-endian")


def _take_weights(tree: Any, storage: Storages, path: Path) -> dict[str, np.ndarray]:
    """{name: array} of the state dict in a checkpoint. Raises UserError if there is none."""

    def tensors(value: Any) -> dict[str, _Tensor]:
        items = value.items() if isinstance(value, Mapping) else ()
        return {str(name): tensor for name, tensor in items if isinstance(tensor, _Tensor)}

    inside = [tensors(tree.get(name)) for name in _CONTAINERS] if isinstance(tree, Mapping) else []
    found = next((some for some in inside if some), tensors(tree))
    if not found:
        holds = ", ".join(map(repr, list(tree)[:5])) if isinstance(tree, Mapping) else type(tree).__name__
        raise UserError(f"{path} holds no weights by name (it has: {holds}); expected a state dict, by itself or under "
                        + ", ".join(_CONTAINERS))  # fmt: skip
    kept: dict[_Storage, np.ndarray] = {}
    out = {}
    for name, tensor in found.items():
        if tensor.storage not in kept:
            kept[tensor.storage] = storage(*tensor.storage)
        out[name] = _view(tensor, kept[tensor.storage])
    return out


def _view(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    """The tensor as a read-only view of its storage. Raises ValueError if it reaches beyond the storage."""
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("a tensor of no valid shape")
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if math.prod(tensor.shape) == 0:
        return storage[:0].reshape(tensor.shape)
    if last >= storage.size:
        raise ValueError("a tensor reaches beyond its storage")
    strides = [stride * storage.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)


def _read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    import safetensors

    out = {}
    for name, tensor in safetensors.deserialize(content):  # its NumPy interface has no bfloat16
        if tensor["dtype"] not in _SAFETENSORS:
            raise ValueError(f"{name} is of the unknown type {tensor['dtype']}")
        array = np.frombuffer(tensor["data"], _SAFETENSORS[tensor["dtype"]]).reshape(tensor["shape"])
        array.flags.writeable = False
        out[name] = array
    return out
