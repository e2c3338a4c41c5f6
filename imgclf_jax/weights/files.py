"""Reads weights from safetensors, PyTorch and NumPy files, without PyTorch and without running code from the file.

Files are untrusted. The first bytes determine the format; then the index, of bounded length, and the arrays are read.
So memory use is bounded by the length of the file, whatever it claims.
"""

import functools
import hashlib
import io
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import safetensors

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.weights import unpickle
from imgclf_jax.weights.unpickle import Refused, Storage, Tensor, Unpickled

log = logging.getLogger(__name__)

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how checkpoints before PyTorch 1.6 start
_SAFETENSORS = {code: dtype for _, _, code, dtype in unpickle.DTYPES}
# Entries of a checkpoint that hold the weights, the first to take first: exponential moving averages before raw ones.
_CONTAINERS = ("model_ema", "state_dict_ema", "ema", "state_dict", "model", "model_state_dict", "net")
_PREFIXES = re.compile(r"(module\.|_orig_mod\.|model\.)*")  # added by DataParallel, torch.compile and Lightning
_MAX_SHARING = 16  # how often, on average, arrays may hold a byte of the file: as often as layers share parameters


def read(path: Path, container: str = "") -> tuple[dict[str, np.ndarray], JsonObject, str]:
    """Reads a safetensors file, a PyTorch checkpoint in its old or its new format, or an .npz file.

    Returns {name: array}, the metadata of a safetensors file, and the file's SHA-256. The format is recognized by
    content. The weights are under the entry `container`, by default the first of `_CONTAINERS`, or at the top level.
    Prefixes that all names share (`module.`, `_orig_mod.`, `model.`) are removed. Arrays have the dtype of the file,
    and may share their memory. Raises UserError for a file that is damaged, of another format, or would run code.
    """
    try:
        with paths.open_regular(path) as file:
            found, metadata = _read(file, path, container)
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.pop("n_averaged", None)  # of an AveragedModel
        shared = min((_PREFIXES.match(name)[0] for name in found), key=len, default="")  # type: ignore[index]
        if all(name.startswith(shared) for name in found):
            found = {name.removeprefix(shared): x for name, x in found.items()}
        if not all(name.isprintable() for name in found):
            raise ValueError("an unprintable name")
        if sum(x.nbytes for x in found.values()) > _MAX_SHARING * size:
            raise ValueError("arrays that are larger than the file")
        return found, metadata, digest
    except Refused as e:
        raise UserError(
            f"{path} {e}, which weights do not need; none of its code was run; save the weights with "
            "torch.save(model.state_dict(), FILE) or as safetensors"
        ) from e
    except UserError:
        raise
    except Exception as e:  # damage can surface as nearly any error of pickle, zipfile, json and NumPy
        raise UserError(f"{path} is damaged or cut short ({reason(e)}); download it again") from e


def _read(file: IO[bytes], path: Path, container: str) -> tuple[dict[str, np.ndarray], JsonObject]:
    """Reads the arrays and the metadata of a file of any format."""
    start = file.read(64)
    file.seek(0)
    if start.startswith(b"PK\3\4"):
        with zipfile.ZipFile(file) as content:
            arrays = all(name.endswith(".npy") for name in content.namelist())
            return (_read_npz(content) if arrays else _find_weights(*_read_zip(content), path, container)), {}
    if start.startswith(pickle.dumps(_MAGIC, 2)):
        return _find_weights(*_read_legacy(file), path, container), {}
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull")
    if re.match(rb"\s*(<!doctype|<html)", start, re.IGNORECASE):
        raise UserError(f"{path} is a web page, not a file of weights; download the file itself")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is neither a PyTorch checkpoint (.pth, .pt, .th) nor a .safetensors or .npz file")
    if container:
        raise UserError(f"{path} has no entries, so no {container!r}; name the file without ::{container}")
    return _read_safetensors(file, path)


type _Storages = Callable[[Storage], bytes]  # reads the elements of a storage


def _read_zip(content: zipfile.ZipFile) -> tuple[Unpickled, _Storages]:
    """Reads PyTorch's format since 1.6: a zip archive with a folder of `data.pkl` and one file per storage.

    Compressed members are refused, so that no array is larger than the file.
    """
    names = content.namelist()
    pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise Refused("is a zip archive of something else")
    folder = pickles[0].removesuffix("data.pkl")

    def member(name: str) -> bytes:
        info = content.getinfo(folder + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a compressed archive, which PyTorch does not write")
        return content.read(info)

    if f"{folder}byteorder" in names and member("byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    if content.getinfo(pickles[0]).file_size > unpickle.MAX_BYTES:
        raise Refused(f"holds more than {unpickle.MAX_BYTES >> 20} MiB besides its arrays")
    tree, _ = unpickle.load(io.BytesIO(member("data.pkl")))
    return tree, lambda storage: member(f"data/{storage.key}")


def _read_legacy(file: IO[bytes]) -> tuple[Unpickled, _Storages]:
    """Reads the older format: five pickles (magic number, version, machine, content, storage keys), then storages."""
    stream = io.BytesIO(file.read(unpickle.MAX_BYTES))
    file_size = file.seek(0, io.SEEK_END)
    magic, protocol, machine = (unpickle.load(stream)[0] for _ in range(3))
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or not machine["little_endian"]:
        raise ValueError("an unknown version, or big-endian numbers")
    tree, dtypes = unpickle.load(stream)
    keys, _ = unpickle.load(stream)
    if not all(isinstance(key, str) for key in keys):
        raise ValueError("an array without a name")
    storages = {}
    file.seek(stream.tell())
    for key in keys:
        length = int.from_bytes(file.read(8), "little") * dtypes[key].itemsize
        if length > file_size - file.tell():
            raise ValueError("an array longer than the file")
        storages[key] = file.read(length)
    return tree, lambda storage: storages[storage.key]


def _find_weights(tree: Unpickled, storages: _Storages, path: Path, container: str) -> dict[str, np.ndarray]:
    """Finds the state dict in a checkpoint, see `read`, and names the others. Raises UserError if there is none."""

    def tensors(value: Unpickled) -> dict[str, Tensor]:
        items = value.items() if isinstance(value, Mapping) else ()
        return {str(name): tensor for name, tensor in items if isinstance(tensor, Tensor)}

    held = tree if isinstance(tree, Mapping) else {}
    names = [container] if container else [name for name in _CONTAINERS if tensors(held.get(name))]
    found = tensors(held.get(names[0])) if names else tensors(tree)
    if not found:
        others = [ascii(name)[:50] for name in list(tree)[:9]] if held else [type(tree).__name__]
        raise UserError(f"{path} holds no named weights{f' under {container!r}' * bool(container)} (it has: "
                        f"{', '.join(others)}); name its entry as in 'FILE::model_ema', or save a state dict at the "
                        "top level")  # fmt: skip
    if names[1:]:
        log.warning("%s holds several sets of weights: %r is taken; choose another by 'FILE::%s'", path, names[0],
                    " or ::".join(names[1:]))  # fmt: skip
    kept = functools.cache(storages)

    def view(tensor: Tensor) -> np.ndarray:
        dtype = tensor.storage.dtype
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.ndarray(tensor.shape, dtype, kept(tensor.storage), tensor.offset * dtype.itemsize, strides)

    return {name: view(tensor) for name, tensor in found.items()}


def _read_npz(content: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """Reads NumPy's format, as big_vision writes it. Arrays of objects, which are pickles, are refused."""
    found, headers = {}, {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    for info in content.infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a compressed archive; save the arrays by numpy.savez")
        member = io.BytesIO(content.read(info))
        shape, fortran, dtype = headers[np.lib.format.read_magic(member)](member)
        dtype = _SAFETENSORS["BF16"] if dtype == np.dtype("V2") else dtype  # NumPy does not know bfloat16
        if dtype not in _SAFETENSORS.values():
            raise Refused(f"has arrays of the type {dtype}")
        array = np.frombuffer(member.getbuffer(), dtype, -1, member.tell())
        found[info.filename.removesuffix(".npy")] = array.reshape(shape, order="F" if fortran else "C")
    return found


def _read_safetensors(file: IO[bytes], path: Path) -> tuple[dict[str, np.ndarray], JsonObject]:
    """Reads a safetensors file by its library, which checks the header against the length of the content."""
    data = file.read()
    found = safetensors.deserialize(data)  # not `safe_open`: `init_from` may be in a bucket
    if unknown := [x["dtype"] for _, x in found if x["dtype"] not in _SAFETENSORS]:
        raise UserError(f"{path} has arrays of the type {unknown[0]:.20}, which is not read; save them as float32")
    arrays = {name: np.frombuffer(x["data"], _SAFETENSORS[x["dtype"]]).reshape(x["shape"]) for name, x in found}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return arrays, header.get("__metadata__") or {}
