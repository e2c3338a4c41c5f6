"""Files from PyTorch and safetensors are read exactly, without either library, and nothing in them is run.

Their claims are compared with their length, and pickles take no memory or time.
"""

import argparse
import collections
import contextlib
import datetime
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_format
from fuzzing import BYTES, answered, with_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from imgclf_jax.core.errors import UserError
from imgclf_jax.weights import files, unpickle

pytestmark = pytest.mark.usefixtures("a_gigabyte")
FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ["zip.pth", "legacy.pth", "all.safetensors"]
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)

# What torch_fixtures.py put into the files.
BASE = np.arange(24, dtype=np.float32).reshape(4, 6) / 8
DTYPES = ("float64", "float16", ml_dtypes.bfloat16, "int64", "int32", "int16", "int8", "uint8", "bool")
EXPECTED = {
    "base": BASE,
    "transposed": BASE.T,
    "part": BASE[1:3, ::2],
    "expanded": np.full((2, 3), 3, np.float32),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.float32([1, -1]),
    **{np.dtype(dtype).name: np.arange(-3, 4).astype(dtype) for dtype in DTYPES},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_tensor(name):
    """Dtypes, strides, shared storages and offsets, in each format, inside a container and without its prefix."""
    found = files.read(FIXTURES / name)[0]
    assert set(found) == set(EXPECTED)
    for key, array in found.items():
        assert (array.dtype, array.shape) == (EXPECTED[key].dtype, EXPECTED[key].shape), key
        np.testing.assert_array_equal(array, EXPECTED[key])


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
        (eval, (f"open({str(marker)!r}, 'w')",)),
        (getattr, (str(marker), "upper")),
        (io.open, (str(marker), "w")),
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
    b"c\x1b[2J\nf\n.",  # for the terminal
    b"c" + b"a" * 5000 + b"\nf\n.",
])  # fmt: skip
def test_what_is_allowed_opens_no_door(tmp_path, opcodes):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + opcodes)
    refused(tmp_path / "x.pth", "")


def refused(path, fragment):
    """One short sentence, which can be printed."""
    with pytest.raises(UserError) as e:
        files.read(path)
    text = str(e.value)
    assert fragment in text
    assert str(path) in text
    assert text.isprintable()
    assert len(text) < 600


def test_a_tensor_lies_within_its_storage(tmp_path):
    """Sizes, strides and offsets that would read other memory are refused."""

    def write(*place):
        storage = {"0": np.arange(4, dtype="<f4").tobytes()}
        return torch_format.write(tmp_path / "x.pth", {"w": torch_format.tensor("0", 4, *place)}, storage)

    np.testing.assert_array_equal(files.read(write(0, (2, 2), (2, 1)))[0]["w"], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(files.read(write(1, (3,), (1,)))[0]["w"], [1, 2, 3])
    for bad in [(1, (4,), (1,)), (0, (2, 2), (3, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2, 2), (1,)),
                (0, (10**9, 10**9), (1, 1)), (4, (), ()), (0, (-2,), (1,)), (0, (2**59,) * 3, (0, 0, 0))]:  # fmt: skip
        refused(write(*bad), "is damaged or cut short")
    assert files.read(write(0, (3, 99), (0, 0)))[0]["w"].shape == (3, 99)  # as PyTorch saves the result of `expand`
    refused(write(0, (1, 400_000_001, 192), (0, 0, 0)), "arrays that are larger than the file")


def test_float8(tmp_path):
    array = np.float32([-0.25, 1.5]).astype(ml_dtypes.float8_e5m2)
    path = torch_format.write(tmp_path / "x.pth", {"w": torch_format.float8("0", 2)}, {"0": array.tobytes()})
    np.testing.assert_array_equal(files.read(path)[0]["w"].astype(np.float32), [-0.25, 1.5])


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file(tmp_path, name):
    """Cut short anywhere; in a zip archive a flipped bit too."""
    content, path = (FIXTURES / name).read_bytes(), tmp_path / name
    for share in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(len(content) * share)])
        refused(path, "is damaged or cut short")
    if name == "zip.pth":
        place = content.find(BASE.tobytes()) + 5
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        refused(path, "is damaged")
    if name == "legacy.pth":  # a storage that claims to be longer than the file
        place = content.index(BASE.tobytes()) - 8
        path.write_bytes(content[:place] + (2**40).to_bytes(8, "little") + content[place + 8 :])
        refused(path, "is damaged")


def test_files_of_other_kinds(tmp_path):
    """An image, a pickle, an empty file, an LFS pointer, a zip archive, one that claims 1 TB: the error says what."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.txt", "")
    for name, content, fragment in [
        ("x.png", b"\x89PNG\r\n", "is neither a PyTorch checkpoint"),
        ("x.pth", pickle.dumps({"w": 1}), "is neither a PyTorch checkpoint"),
        ("e.pth", b"", "is neither a PyTorch checkpoint"),
        ("l.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        ("w.pth", b"\n<!DOCTYPE html>\n<html>", "is a web page"),
        ("n.pth", (tmp_path / "x.zip").read_bytes(), "is a zip archive of something else"),
    ]:
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, fragment)
    for name, start in (("t.pth", MAGIC), ("t.safetensors", b""), ("u.pth", b"PK\3\4")):
        with (tmp_path / name).open("wb") as file:  # no disk has to hold it
            file.write(start)
            file.truncate(10**12)
        refused(tmp_path / name, "")


@pytest.mark.parametrize("content", [{"epoch": 3, "a": {"b": 1}}, [1, 2], {"\x1b[2J" * 1000: 1}])
def test_no_weights_by_name(tmp_path, content):
    refused(checkpoint(content, "legacy", tmp_path), "holds no named weights")


def test_what_stands_beside_the_arrays_is_bounded(tmp_path):
    path = checkpoint({"history": "x" * unpickle.MAX_BYTES, "w": 1}, "zip", tmp_path)
    refused(path, "holds more than 4 MiB besides its arrays, which weights do not need")
    packed, tensor = tmp_path / "y.pth", torch_format.tensor("0", 1000, 0, (9,), (1,))
    torch_format.write(path, {"w": tensor}, {"0": bytes(4000)})
    with zipfile.ZipFile(path) as content, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in content.infolist():
            archive.writestr(info.filename, content.read(info))
    refused(packed, "a compressed archive, which PyTorch does not write")
    refused(torch_format.write(path, {"\x1b[2J": tensor}, {"0": bytes(4000)}), "unprintable name")


def entry(**more):
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **more}}


@pytest.mark.parametrize("header", [
    entry(shape=[400_000_001, 192]), entry(shape=[3]), entry(shape=[-2]), entry(shape=[1] * 99),
    entry(shape=[20], data_offsets=[0, 80]), entry(dtype="F4"), [], b"[" * 100_000,
])  # fmt: skip
def test_headers_of_safetensors(tmp_path, header):
    text, path = header if isinstance(header, bytes) else json.dumps(header).encode(), tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    refused(path, "is damaged or cut short")


def test_the_length_and_the_metadata_of_a_header(tmp_path):
    path, text = tmp_path / "x.safetensors", json.dumps(entry() | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert files.read(path)[0]["w"].tolist() == [0, 0]
    assert files.read(path)[1] == {"format": "pt"}
    for size in (2**63, 1000):
        path.write_bytes(size.to_bytes(8, "little") + text + bytes(8))
        refused(path, "is damaged or cut short")
    path.write_bytes((FIXTURES / "zip.pth").read_bytes())  # under this name; read by its content
    arrays, metadata, _ = files.read(path)
    assert arrays
    assert metadata == {}


@settings(max_examples=150)
@given(st.sampled_from(KINDS), BYTES, st.sampled_from([0, 0, 0, 1, 99, 1000]))
def test_weights_with_changed_bytes(tmp_path_factory, name, changes, cut):
    path = tmp_path_factory.mktemp("weights") / name
    path.write_bytes(with_bytes((FIXTURES / name).read_bytes(), changes, cut))
    arrays, *_ = answered(files.read, path) or ({},)
    assert all(array.nbytes >= 0 for array in arrays.values())


KEYS = st.one_of(st.text(max_size=4), st.integers(-(2**59), 2**59))
LEAVES = st.one_of(KEYS, st.booleans(), st.none(), st.floats(), st.binary(max_size=4), st.integers(), st.just(()))
PLAIN = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


def load(content):
    return unpickle.load(io.BytesIO(content))[0]


@given(PLAIN, st.sampled_from([3, 4, 5]))  # earlier ones write bytes as calls
def test_plain_data_come_out_as_python_reads_them(value, protocol):
    """An object referenced twice is one object."""
    content = pickle.dumps([value, value], protocol)
    got, again = load(content)
    assert got == value
    assert type(got) is type(value)
    if isinstance(value, (list, dict)):
        assert got is again


def test_the_ordered_dicts_of_python_2():
    content = b"\x80\2" + call("collections.OrderedDict", b"](](U\1aK\1e](U\1bK\2ee\x85") + b"."
    assert load(content) == collections.OrderedDict(a=1, b=2)


def test_what_training_scripts_save_beside_weights():
    """It is dropped without being made."""
    beside = [argparse.Namespace(lr=0.1, out=Path("x")), np.float64(0.5), np.arange(3.0), {1}, datetime.datetime.now()]
    content = {"beside": beside, "log": collections.defaultdict(list, a=[1, 2])}
    assert load(pickle.dumps(content, 2)) == {"beside": [None] * 5, "log": {"a": [1, 2]}}


def call(name, arguments):
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + arguments + b"R"


TUPLES = b")" + b"q\0" + b"h\0\x86q\0" * 60  # a tuple of a tuple twice, 60 deep: 2**60 leaves in 240 bytes
MANY = b"](" + b"N" * 200_000 + b"e" + b"q\1"  # a list of 200,000 at place 1 of the memo
PAIRS = b"](" + b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(50_000)) + b"eq\1"
BOMBS = {
    "a memo of 2**31 places": (b"Nr\xff\xff\xff\x7f.", None),
    "a text of 2**62 bytes": (b"\x8d" + struct.pack("<Q", 2**62) + b"x.", ".*"),
    "a frame of 2**62 bytes": (b"\x80\4\x95" + struct.pack("<Q", 2**62) + b"N", ".*"),
    "a key of 2**60 leaves": (b"}" + TUPLES + b"Ns.", "neither a text"),
    "a set of 2**60 leaves": (b"\x8f(" + TUPLES + b"\x90.", "143"),
    "a call for a dict of 2**60 leaves": (
        b"]]" + TUPLES + b"aNaaq\1" + call("collections.OrderedDict", b"h\1\x85") + b".", "neither a text"
    ),
    "a storage's name of 2**60 leaves": (b"(" + torch_format.text("storage") + TUPLES + b"h\0NNtQ.", "malformed"),
    "keys with one hash": (b"}\x8a\x08" + struct.pack("<q", 2**61 - 1) + b"Ns.", "neither a text"),
    "tuples of lists": (MANY + call("torch.Size", b"h\1\x85") * 20_000 + b".", "again and again"),
    "dicts of dicts": (PAIRS + call("collections.OrderedDict", b"h\1\x85") * 20_000 + b".", "again and again"),
    "attributes of many dicts": (PAIRS + (call("collections.OrderedDict", b")") + b"h\1b") * 1000 + b".", None),
    "lists 100,000 deep": (b"]" * 100_000 + b"a" * 99_999 + b".", None),
    "an object": (b"ccollections\nOrderedDict\n)\x81.", None),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_takes_neither_memory_nor_time(name):
    content, fragment = BOMBS[name]
    tracemalloc.start()
    try:
        # files.read gives one sentence for all of them; an opcode that is not plain data is a KeyError
        with pytest.raises(Exception, match=fragment) if fragment else contextlib.nullcontext():
            load(content)
        assert tracemalloc.get_traced_memory()[1] < 200 * len(content) + 1_000_000
    finally:
        tracemalloc.stop()
