"""Fuzzed array files: each is read or refused in one sentence, and never takes a gigabyte."""

import sys
import zipfile

import numpy as np
import pytest
from fuzzing import BYTES, MAX, SHAPES, answered, mostly, with_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from imgclf_jax.data import sources
from imgclf_jax.data.source import read_examples

pytestmark = pytest.mark.usefixtures("a_gigabyte")

TYPES = st.sampled_from(
    ["|u1", "<i8", ">i4", "<u8", "|b1", "<f8", "|O", "<U3", "|S3", "<M8[s]", "|V8", "|V0", [("a", "|u1")], "x", 3, None]
)  # fmt: skip


@st.composite
def npy(draw, shape, descr):
    """An .npy file with a correct header, or with part of it changed."""
    array = np.zeros(draw(mostly(shape, st.sampled_from([(6, 1), (6, 4, 5, 3), (6, 0, 5), (5,), ()]))), descr)
    header = {"descr": descr, "fortran_order": False, "shape": array.shape}
    for key, values in (("descr", TYPES), ("shape", SHAPES), ("fortran_order", st.sampled_from([True, 1, None]))):
        header[key] = draw(mostly(header[key], values))
    key = draw(mostly("shape", st.sampled_from(["x", "shape ", ""])))
    header[key] = header.pop("shape")
    text = with_bytes(repr(header).encode(), draw(mostly([], BYTES))) + b"\n"
    version = draw(mostly(1, st.sampled_from([2, 3, 9])))
    length = draw(mostly(len(text), st.sampled_from([0, 9, 65535])))
    data = bytes(draw(mostly(array.nbytes, st.sampled_from([0, 1, array.nbytes * 2]))))
    return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(2 if version == 1 else 4, "little") + text + data


NPZ_NAMES = st.sampled_from(
    ["x_train", "y_train", "class_names", "train_images", "train_labels", "images", "x_", "é", "a/b"]
)
METHODS = mostly(zipfile.ZIP_STORED, st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))


@settings(max_examples=100)
@given(
    npy((6, 4, 5), "|u1"), npy((6,), "<i8"), mostly(None, npy((3,), "<U3")),
    st.dictionaries(NPZ_NAMES, npy((2, 2), "|u1"), max_size=2), METHODS,
    mostly([], BYTES), mostly(0, st.integers(1, 90)),
)  # fmt: skip
def test_npz(tmp_path_factory, images, labels, names, more, method, changes, cut):
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    with zipfile.ZipFile(path, "w", method) as content:
        for key, data in ({"x_train": images, "y_train": labels, "class_names": names} | more).items():
            if data is not None:
                content.writestr(f"{key}.npy", data)
    for some in (path.read_bytes(), with_bytes(path.read_bytes(), changes, cut)):
        path.write_bytes(some)
        for source in (answered(sources.open_splits, f"arrays({str(path)!r})") or {}).values():
            examples = read_examples(source, np.arange(source.size))
            assert (examples["image"].dtype, examples["image"].ndim) == (np.uint8, 4)
            assert 0 <= examples["label"].min() <= examples["label"].max() < len(source.class_names) <= 1_000_000


def test_the_limit_holds():
    if sys.platform == "linux":
        with pytest.raises(MemoryError):
            bytes(8 * MAX)  # more than memory that was taken and freed before has room for
