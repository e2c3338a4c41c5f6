"""Manifests: content that does not match the checkpoint is a fault in one sentence, never an exception."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imgclf_jax.run import manifest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "inner").mkdir()
    (folder / "a").write_bytes(bytes(3 << 20))
    (folder / "inner" / "b").write_bytes(b"12")
    manifest.write(folder)
    return folder


def test_the_size_and_checksum_of_each_file(folder):
    assert manifest.find_fault(folder) == ""
    whole = json.loads((folder / manifest.NAME).read_text())
    assert whole["inner/b"] == [2, 0x4F5344CD]  # CRC-32 of "12"
    assert whole["a"][0] == 3 << 20


@example(b"{}")
@example(b'{"a": [true, 1]}')
@example(b'{"a": ["1", 2]}')
@example(b"[" * 100_000)
@given(st.binary(max_size=30) | JSON.map(json.dumps).map(str.encode)
       | st.dictionaries(st.text(max_size=5) | st.sampled_from(["a", "inner/b", "\0", "inner", "/dev/zero"]),
                         st.lists(st.integers(), min_size=2, max_size=2)).map(json.dumps).map(str.encode))  # fmt: skip
def test_any_manifest(folder, content):
    before = (folder / manifest.NAME).read_bytes()
    try:
        (folder / manifest.NAME).write_bytes(content)
        assert manifest.find_fault(folder)
    finally:
        (folder / manifest.NAME).write_bytes(before)
