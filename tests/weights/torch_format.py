"""PyTorch's file format, written without PyTorch, opcode by opcode, to make valid and invalid files."""

import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integers(values: Sequence[int]) -> bytes:
    """A tuple."""
    return b"(" + b"".join(b"I%d\n" % value for value in values) + b"t"


def tensor(key: str, size: int, offset: int, shape: Sequence[int], strides: Sequence[int]) -> bytes:
    """The opcodes of a float32 tensor over the storage `key` of `size` elements."""
    view = b"I%d\n" % offset + integers(shape) + integers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + _storage("torch", "Float", key, size) + view + b"\x89NtR"


def float8(key: str, size: int) -> bytes:
    """The opcodes of a float8 tensor of `size` elements, whose storage has no type."""
    view = b"I0\n" + integers([size]) + integers([1]) + b"\x89Nctorch\nfloat8_e5m2\ntR"
    return b"ctorch._utils\n_rebuild_tensor_v3\n(" + _storage("torch.storage", "Untyped", key, size) + view


def _storage(module: str, kind: str, key: str, size: int) -> bytes:
    named = f"c{module}\n{kind}Storage\n".encode()
    return b"(" + text("storage") + named + text(key) + text("cpu") + b"I%d\ntQ" % size


def write(path: Path, items: Mapping[str, bytes], storages: Mapping[str, bytes]) -> Path:
    """Writes a file of 1.6 and later: a dict of names and the opcodes of their values, and the storages' bytes."""
    content = b"\x80\x02}(" + b"".join(text(name) + value for name, value in items.items()) + b"u."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Writes what `torch.save` would for a state dict of these f32 arrays."""
    return write(path, *_items(arrays, ""))


def save_nested(path: Path, dicts: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    """Writes a checkpoint of several state dicts."""
    items, storages = {}, {}
    for name, arrays in dicts.items():
        inner, own = _items(arrays, name)
        items[name] = b"}(" + b"".join(text(key) + value for key, value in inner.items()) + b"u"
        storages |= own
    return write(path, items, storages)


def _items(arrays: Mapping[str, np.ndarray], prefix: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The opcodes of the tensors by name, and their storages, whose names begin with `prefix`."""
    items, storages = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        array = np.array(array, "<f4", order="C")
        items[name] = tensor(f"{prefix}{i}", array.size, 0, array.shape, [stride // 4 for stride in array.strides])
        storages[f"{prefix}{i}"] = array.tobytes()
    return items, storages
