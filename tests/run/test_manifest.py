"""Manifests: content that does not match the checkpoint is a fault in one sentence, never an exception."""

import json

import pytest

from imgclf_jax.run import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(bytes(3 << 20))
    (tmp_path / "inner" / "b").write_bytes(b"12")
    manifest.write(tmp_path)
    return tmp_path


def test_the_size_and_checksum_of_each_file(folder):
    assert manifest.find_fault(folder) == ""
    whole = json.loads((folder / manifest.NAME).read_text())
    assert whole["inner/b"] == [2, 0x4F5344CD]  # CRC-32 of "12"
    assert whole["a"][0] == 3 << 20


@pytest.mark.parametrize("content", [
    b"", b"{}", b"3", b"[[]]", b"\xff", b'{"a": [true, 1]}', b'{"a": ["1", 2]}', b'{"a": [1]}', b'{"a": {"b": 1e999}}',
    b'{"\\u0000": [1, 1]}', b'{"inner": [1, 1]}', b'{"/dev/zero": [1, 1]}', b"[" * 100_000,
])  # fmt: skip
def test_any_manifest(folder, content):
    (folder / manifest.NAME).write_bytes(content)
    assert manifest.find_fault(folder)
