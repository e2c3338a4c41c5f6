"""The claims of a weights file are compared with its length, and arrays that no model needs are not read."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch_format
from test_files import BASE, FIXTURES, MAGIC, checkpoint

from imgclf_jax.core.errors import UserError
from imgclf_jax.weights import files, unpickle

pytestmark = pytest.mark.usefixtures("a_gigabyte")


def refused(path, fragment):
    with pytest.raises(UserError) as e:
        files.read(path)
    assert fragment in str(e.value)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 600


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "all.safetensors"])
def test_arrays_that_are_not_wanted_are_not_read(name):
    whole = files.read(FIXTURES / name)
    asked = []

    def wanted(label, shape):
        asked.append((label, shape))
        return label == "base"

    some = files.read(FIXTURES / name, wanted)
    assert dict(asked) == {label: array.shape for label, array in whole.items()}
    np.testing.assert_array_equal(some["base"], whole["base"])
    for label, array in some.items():
        assert array.shape == whole[label].shape
        assert label == "base" or (not array.any() and not any(array.strides))


def test_a_view_of_few_numbers_may_be_of_any_size_but_takes_memory_only_if_it_is_wanted(tmp_path):
    """PyTorch saves the result of `expand` as it is, with strides of zero."""
    huge = torch_format.tensor("0", 16, 0, (1, 400_000_001, 192), (0, 0, 0))
    path = torch_format.write(tmp_path / "x.pth", {"w": huge}, {"0": bytes(64)})
    assert files.read(path, lambda *_: False)["w"].shape == (1, 400_000_001, 192)
    assert files.read(path)["w"].shape == (1, 400_000_001, 192)
    more = torch_format.tensor("0", 16, 0, (2**59,) * 3, (0, 0, 0))
    refused(torch_format.write(path, {"w": more}, {"0": bytes(64)}), "is damaged")


def test_a_compressed_checkpoint_is_refused(tmp_path):
    path = torch_format.write(
        tmp_path / "x.pth", {"w": torch_format.tensor("0", 1000, 0, (9,), (1,))}, {"0": bytes(4000)}
    )
    with zipfile.ZipFile(path) as content, zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for info in content.infolist():
            packed.writestr(info.filename, content.read(info))
    files.read(path)
    refused(tmp_path / "y.pth", "a compressed archive, which PyTorch does not write")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as content:  # the arrays alone
        content.writestr("archive/data/1", bytes(10**6))
    files.read(path)  # 1 is not asked for


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_what_stands_beside_the_arrays_is_bounded(tmp_path, format):
    path = checkpoint({"history": "x" * unpickle.MAX_BYTES, "w": 1}, format, tmp_path)
    refused(path, "holds more than 4 MiB besides its arrays, which weights do not need")


def test_a_name_for_the_terminal_is_not_printed(tmp_path):
    tensor = torch_format.tensor("0", 4, 0, (4,), (1,))
    refused(torch_format.write(tmp_path / "x.pth", {"\x1b[2J": tensor}, {"0": bytes(16)}), "unprintable name")
    for module in (b"\x1b[2J", b"a" * 5000):
        with zipfile.ZipFile(tmp_path / "y.pth", "w") as content:
            content.writestr("x/data.pkl", b"\x80\2c" + module + b"\nf\n.")
        refused(tmp_path / "y.pth", "none of its code was run")
    with pytest.raises(UserError) as e:
        files.read(checkpoint({"\x1b[2J" * 1000: 1}, "zip", tmp_path))
    assert "\x1b" not in str(e.value)
    assert len(str(e.value)) < 300


def test_lengths_of_the_older_format(tmp_path):
    """A storage that claims to be longer than the file."""
    content = (FIXTURES / "legacy.pth").read_bytes()
    place = content.index(BASE.tobytes()) - 8
    assert content[place : place + 8] == (24).to_bytes(8, "little")
    for length in (10**6, 2**40, 2**63):
        (tmp_path / "x.pth").write_bytes(content[:place] + length.to_bytes(8, "little") + content[place + 8 :])
        refused(tmp_path / "x.pth", "is damaged")
    (tmp_path / "m.pth").write_bytes(MAGIC + b"]." * 4)
    refused(tmp_path / "m.pth", "is damaged")


def safetensors(path, header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return path


def entry(**more):
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **more}}


@pytest.mark.parametrize(("header", "fragment"), [
    (entry(shape=[400_000_001, 192]), "with the wrong number of bytes"),
    (entry(shape=[-2]), "invalid shape"),
    (entry(shape=[2.0]), "invalid shape"),
    (entry(shape=[True, 2]), "invalid shape"),
    (entry(shape=[1] * 33), "invalid shape"),
    (entry(shape=[2**60]), "invalid shape"),
    (entry(shape="ab"), "invalid shape"),
    (entry(shape=3), "is damaged"),
    (entry(data_offsets=[0, 2**62]), "invalid shape"),
    (entry(data_offsets=[0, 80]), "with the wrong number of bytes"),
    (entry(data_offsets=[8, 16]), "with the wrong number of bytes"),
    (entry(data_offsets=[0]), "is damaged"),
    (entry(data_offsets={}), "is damaged"),
    (entry(dtype="F4"), "the unknown type 'F4'"),
    (entry(dtype=[]), "is damaged"),
    (entry() | {"v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "with the wrong number of bytes"),
    (entry() | {"v": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, "do not fill it"),
    ({}, "do not fill it"),
    ([], "is damaged"),
    (3, "is damaged"),
    ({"w": 3}, "is damaged"),
    (b"", "is damaged"),
    (b"[" * 100_000, "is damaged"),
    (b'{"w":' * 100_000, "is damaged"),
    (b"9" * 100_000, "is damaged"),
])  # fmt: skip
def test_headers_of_safetensors(tmp_path, header, fragment):
    refused(safetensors(tmp_path / "x.safetensors", header, bytes(8)), fragment)


def test_the_header_of_safetensors_is_bounded(tmp_path):
    good = safetensors(tmp_path / "x.safetensors", entry() | {"__metadata__": {"format": "pt"}}, bytes(8))
    assert files.read(good)["w"].tolist() == [0, 0]
    for size in (2**63, 2**40, 1000):
        refused(safetensors(tmp_path / "x.safetensors", entry(), bytes(8), size), f"its header claims {size} bytes")
    with (tmp_path / "x.safetensors").open("wb") as file:  # of 20 MB, which no disk has to hold
        file.write((17 << 20).to_bytes(8, "little"))
        file.truncate(20 << 20)
    refused(tmp_path / "x.safetensors", "its header claims")


def test_a_file_of_another_kind_is_not_read(tmp_path):
    """Not even if it claims 1 TB, which no disk has to hold."""
    for name, start in (("x.pth", b"\x89PNG"), ("x.pth", MAGIC), ("x.safetensors", b""), ("x.pth", b"PK\3\4")):
        with (tmp_path / name).open("wb") as file:
            file.write(start)
            file.truncate(10**12)
        with pytest.raises(UserError):
            files.read(tmp_path / name)
        (tmp_path / name).unlink()


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "is not a regular file")


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_a_pytorch_file_under_the_name_of_a_safetensors_file(tmp_path, name):
    """It is read by its content, and has no metadata."""
    file = tmp_path / "x.safetensors"
    file.write_bytes((FIXTURES / name).read_bytes())
    assert files.read(file)
    assert files.read_metadata(file) == {}
