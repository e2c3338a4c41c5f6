"""Fuzzed weights files: each is read or refused in one sentence, and never takes a gigabyte."""

import zipfile
from pathlib import Path

import pytest
import torch_format
from fuzzing import BYTES, SIZES, answered, mostly, with_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from imgclf_jax.weights import files

pytestmark = pytest.mark.usefixtures("a_gigabyte")
FIXTURES = Path(__file__).parent / "fixtures"


@settings(max_examples=150)
@given(st.sampled_from(["zip.pth", "legacy.pth", "all.safetensors"]), BYTES, st.sampled_from([0, 0, 0, 1, 99, 1000]))
def test_weights_with_changed_bytes(tmp_path_factory, name, changes, cut):
    path = tmp_path_factory.mktemp("weights") / name
    path.write_bytes(with_bytes((FIXTURES / name).read_bytes(), changes, cut))
    for array in (answered(files.read, path) or {}).values():
        assert array.nbytes >= 0


INTS = st.one_of(SIZES, st.integers()).map(lambda n: b"I%d\n" % n)
OPCODES = st.one_of(
    INTS,
    st.sampled_from([b"N", b"]", b"}", b")", b"(", b"\x8f", b"\x88", b"t", b"l", b"d", b"e", b"a", b"s", b"u", b"\x85",
                     b"\x86", b"\x87", b"R", b"b", b"Q", b"\x94", b"q\0", b"q\1", b"h\0", b"h\1", b"r\xff\xff\xff\x7f",
                     b"j\xff\xff\xff\xff", b"2", b"0", b"1", b"\x90", b"\x91", b"\x81", b"\x93", b".", b"\x80\4",
                     b"\x95" + bytes(7) + b"\x40", b"\x8d" + bytes(7) + b"\x40", b"\x96" + bytes(7) + b"\x40",
                     b"\x8b\xff\xff\xff\x7f", b"\x8a\xff", b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n",
                     b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n", b"ctorch\nFloatStorage\n"]),
    st.sampled_from(["storage", "0", "w", "", "state_dict", "x" * 1000]).map(torch_format.text),
)  # fmt: skip


PIECES = st.lists(OPCODES, min_size=1, max_size=4).map(b"".join)


@st.composite
def tensor(draw):
    """The opcodes of a tensor whose numbers, or any part, may be replaced."""
    sizes = st.lists(SIZES, max_size=3)
    parts = [("0", st.sampled_from(["1", "9"])), (4, SIZES), (0, SIZES), ((2, 2), sizes), ((2, 1), sizes)]
    whole = torch_format.tensor(*(draw(mostly(*part)) for part in parts))
    place = draw(st.integers(0, len(whole)))
    return whole[:place] + draw(mostly(b"", PIECES)) + whole[place:]


@settings(max_examples=200)
@given(
    st.dictionaries(mostly("w", st.sampled_from(["v", "", "\n"])), tensor(), min_size=1, max_size=2), PIECES,
    st.integers(0, 400), mostly(zipfile.ZIP_STORED, st.just(zipfile.ZIP_DEFLATED)),
)  # fmt: skip
def test_a_checkpoint_of_other_instructions(tmp_path_factory, items, more, place, method):
    content = b"\x80\x02}(" + b"".join(torch_format.text(name) + value for name, value in items.items()) + b"u."
    content = content[:place] + more + content[place:]
    path = tmp_path_factory.mktemp("pth") / "x.pth"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/data/1", bytes(3))
    for array in (answered(files.read, path) or {}).values():
        assert array.size == 0 or array.flat[0] == 0
