"""Files from PyTorch and safetensors are read exactly, without either library, and nothing in them is run."""

import io
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_format

from imgclf_jax.core.errors import UserError
from imgclf_jax.weights import files

FIXTURES = Path(__file__).parent / "fixtures"
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)

# What torch_fixtures.py put into the files.
BASE = np.arange(24, dtype=np.float32).reshape(4, 6) / 8
COUNT = np.arange(-3, 4)
EXPECTED = {
    "base": BASE,
    "transposed": BASE.T,
    "part": BASE[1:3, ::2],
    "expanded": np.full((2, 3), 3, np.float32),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.float32([1, -1]),
    "float64": COUNT.astype(np.float64),
    "float16": COUNT.astype(np.float16),
    "bfloat16": COUNT.astype(ml_dtypes.bfloat16),
    "int64": COUNT.astype(np.int64),
    "int32": COUNT.astype(np.int32),
    "int16": COUNT.astype(np.int16),
    "int8": COUNT.astype(np.int8),
    "uint8": COUNT.astype(np.uint8),
    "bool": COUNT.astype(bool),
}


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "all.safetensors"])
def test_every_kind_of_tensor(name):
    """Dtypes, strides, shared storages and offsets, in each format, inside a container and without its prefix."""
    found = files.read(FIXTURES / name)
    assert set(found) == set(EXPECTED)
    for key, array in found.items():
        assert (array.dtype, array.shape) == (EXPECTED[key].dtype, EXPECTED[key].shape), key
        np.testing.assert_array_equal(array, EXPECTED[key])
        assert not array.flags.writeable, key


class Raw:
    """An object that pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def checkpoint(content: object, format: str, folder: Path) -> Path:
    """A file in PyTorch's format with the pickle of `content`."""
    path = folder / f"{format}.pth"
    if format == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, 2))
            archive.writestr("archive/data/0", bytes(16))
    else:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        path.write_bytes(MAGIC + b"".join(pickle.dumps(x, 2) for x in (1001, system, content, [])))
    return path


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_code_is_refused_and_not_run(tmp_path, format):
    """Any call outside the table, alone or hidden among weights: one sentence that names it, and no effect."""
    marker = tmp_path / "marker"
    for function, arguments in [
        (os.system, (f"touch {marker}",)),
        (subprocess.getoutput, (f"touch {marker}",)),
        (eval, (f"open({str(marker)!r}, 'w')",)),
        (getattr, (str(marker), "upper")),
        (io.open, (str(marker), "w")),
        (__import__, ("os",)),
    ]:
        path = checkpoint({"state_dict": {"w": 1}, "args": [Raw(function, *arguments)]}, format, tmp_path)
        with pytest.raises(UserError, match="none of its code was run") as e:
            files.read(path)
        assert f".{function.__name__}, which weights do not need" in str(e.value)
        assert not marker.exists()
    pickle.loads(pickle.dumps(Raw(os.system, f"touch {marker}")))
    assert marker.exists()  # it would have been run


@pytest.mark.parametrize("opcodes", [
    b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",  # sets an attribute of a class
    b"ctorch\nFloatStorage\n}X\x01\x00\x00\x00aK\x01sb.",
    b"ctorch._utils\n_rebuild_tensor\n(K\x01K\x02K\x03K\x04tR.",  # a tensor without a storage
    b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    b"cbuiltins\ndict.fromkeys\n.",
])  # fmt: skip
def test_what_is_allowed_opens_no_door(tmp_path, opcodes):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + opcodes)
    with pytest.raises(UserError, match=r"is damaged|none of its code was run"):
        files.read(path)


def test_a_tensor_lies_within_its_storage(tmp_path):
    """Sizes, strides and offsets that would read other memory are refused."""

    def read(*place):
        path = torch_format.write(
            tmp_path / "x.pth", {"w": torch_format.tensor("0", 4, *place)}, {"0": np.arange(4, dtype="<f4").tobytes()}
        )
        return files.read(path)["w"]

    np.testing.assert_array_equal(read(0, (2, 2), (2, 1)), [[0, 1], [2, 3]])
    np.testing.assert_array_equal(read(1, (3,), (1,)), [1, 2, 3])
    np.testing.assert_array_equal(read(3, (), ()), 3)
    for bad in [(1, (4,), (1,)), (0, (2, 2), (3, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2, 2), (1,)),
                (0, (10**9, 10**9), (1, 1)), (4, (), ()), (0, (-2,), (1,))]:  # fmt: skip
        with pytest.raises(UserError, match="is damaged or cut short"):
            read(*bad)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "all.safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short(tmp_path, name, share):
    content = (FIXTURES / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="is damaged or cut short") as e:
        files.read(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_flipped_bit_of_a_zip(tmp_path):
    content = bytearray((FIXTURES / "zip.pth").read_bytes())
    place = content.find(BASE.tobytes())
    content[place + 5] ^= 1
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        files.read(tmp_path / "x.pth")


def test_files_of_other_kinds(tmp_path):
    """An image, a pickle, an empty file, an LFS pointer, an .npz, a TorchScript program: the error says what it is."""
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:  # as `torch.jit.save` has it
        for name in ("data.pkl", "constants.pkl", "code/__torch__/x.py"):
            archive.writestr(f"x/{name}", b"")
    for name, content, fragment in [
        ("x.png", b"\x89PNG\r\n", "is neither a PyTorch checkpoint"),
        ("x.pth", pickle.dumps({"w": 1}), "is neither a PyTorch checkpoint"),
        ("e.pth", b"", "is neither a PyTorch checkpoint"),
        ("l.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        ("n.pth", (tmp_path / "x.npz").read_bytes(), "is a zip archive of something else"),
        ("s.pt", (tmp_path / "x.zip").read_bytes(), "is a TorchScript program"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=fragment) as e:
            files.read(tmp_path / name)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [{"epoch": 3, "a": {"b": 1}}, [1, 2], 3])
def test_no_weights_by_name(tmp_path, content):
    with pytest.raises(UserError, match="holds no named weights"):
        files.read(checkpoint(content, "legacy", tmp_path))
