"""Arrays in .npz files, labels or targets; sizes that a file claims are trusted only up to its length."""

import dataclasses
import os
import zipfile

import jax
import numpy as np
import pytest

from imgclf_jax.core import machine, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import placement, sampling, sources, stream
from imgclf_jax.data.arrays import load_array
from imgclf_jax.data.source import Source, read_examples
from imgclf_jax.programs import programs_for_images
from imgclf_jax.train.evaluation import check_targets

pytestmark = pytest.mark.usefixtures("a_gigabyte")

X = np.random.default_rng(0).integers(0, 256, (6, 4, 5), np.uint8)
Y = np.array([0, 2, 1, 2, 0, 1])


def npz(path, **data):
    np.savez(path / "data.npz", **data)
    return f"arrays({str(path / 'data.npz')!r})"


@pytest.mark.parametrize(("data", "message"), [
    ({"pictures": X, "labels": Y}, "holds ['labels', 'pictures']; expected x_NAME and y_NAME, such as x_train and y_"),
    ({"x_train": X / 255, "y_train": Y}, "x_train is float64[6, 4, 5] and y_train is int64[6]"),
    ({"x_train": X[0], "y_train": Y}, "x_train is uint8[4, 5] and y_train is int64[6]"),
    ({"x_train": X, "y_train": Y[:5]}, "x_train is uint8[6, 4, 5] and y_train is int64[5]"),
    ({"x_train": X, "y_train": Y - 1}, "y_train: Source: labels are from -1 to 1 for 2 class_names"),
    ({"x_train": X, "y_train": Y, "class_names": ["a", "b"]}, "y_train: Source: labels are from 0 to 2 for 2"),
    ({"x_train": X, "y_train": Y, "train_images": X, "train_labels": Y}, "since all are of the split 'train'"),
    # A huge label, made by mistake, allocates no names for classes without examples.
    ({"x_train": X, "y_train": np.where(Y == 2, 2**62, Y)}, f"the 6 labels are from 0 to {2**62}; number the classes"),
    ({"x_train": X, "y_train": Y + 1}, "labels are from 1 to 3; number the classes 0, 1, 2, …, or name all of them in"),
    *(({"x_train": X, "y_train": Y, "class_names": names}, "the names are not text") for names in (
        np.array([b"a", b"b", b"\xff"]), np.array([0, 0, 0x110000], "<u4").view("<U1"), ["a", "b", "\ud800"])),
    ({"x_train": X, "y_train": Y, "class_names": np.array(["a", "b", None], object)}, "Object arrays cannot be loaded"),
])  # fmt: skip
def test_arrays_of_another_kind_are_refused(tmp_path, data, message):
    with pytest.raises(UserError) as e:
        sources.open_splits(npz(tmp_path, **data))
    assert message in str(e.value)
    assert str(tmp_path / "data.npz") in str(e.value)


@pytest.mark.parametrize("names", [["cat", "dog", "Öl"], np.array([b"cat", b"dog", "Öl".encode()])])
def test_class_names_are_text(tmp_path, names):
    assert sources.open_splits(npz(tmp_path, x_train=X, y_train=Y, class_names=names))["train"].class_names == (
        "cat", "dog", "Öl")  # fmt: skip


@pytest.mark.parametrize("content", [None, b"", b"hello", "cut short", "damaged"])
def test_what_is_no_npz_file_is_named(tmp_path, content):
    file = tmp_path / "data.npz"
    if content is not None:
        np.savez_compressed(file, x_train=X, y_train=Y)
        whole = file.read_bytes()
        start = whole.index(b"x_train.npy") + 40
        damaged = whole[:start] + bytes(40) + whole[start + 40 :]
        file.write_bytes({"cut short": whole[:-50], "damaged": damaged}.get(content, content))
    with pytest.raises(UserError, match=r"cannot read '.*data\.npz' as an \.npz file"):
        sources.open_splits(f"arrays({str(file)!r})")


@pytest.mark.parametrize(("layout", "splits"), [
    ("x_{0} y_{0}", ("train", "test")),  # Keras, whose cifar10 has labels [n, 1]
    ("{0}_images {0}_labels", ("train", "val", "test")),  # MedMNIST
    ("images labels", ("train",)),
])  # fmt: skip
def test_names_that_others_use(tmp_path, layout, splits):
    data, channels = {}, np.repeat(X[..., None], 3, -1)
    for i, split in enumerate(splits):
        images, labels = layout.format(split).split()
        data |= {images: channels[i:] if i else X, labels: Y[i:, None].astype(np.uint8)}
    base = sources.open_splits(npz(tmp_path, **data, other=np.array([{}], dtype=object)))  # `other` is not read
    assert tuple(base) == tuple(sorted(splits))
    for i, split in enumerate(splits):
        examples = read_examples(base[split], np.arange(base[split].size))
        np.testing.assert_array_equal(examples["image"], channels[i:] if i else X[..., None])
        np.testing.assert_array_equal(examples["label"], Y[i:])
        assert examples["label"].dtype == np.int32
        assert base[split].class_names == ("0", "1", "2")  # those of all splits


def header(shape, descr="|u1"):
    """The start of an .npy file that claims an array of this shape."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("start", [
    header((10**13,)), header((2**63, 2**63, 2**63)), header((6, 4, -5)), header((6, 4, 5), "O"), header(()),
    header((6, 4, 5), [("a", "u1", (10**6, 10**6))]), header((6, 4, 5), "V9999999999"),
    b"\x93NUMPY\2\0\xff\xff\xff\x7f", b"", b"\x93NUMPY\1\0\x40\1" + b"(" * 320,
])  # fmt: skip
def test_a_header_that_claims_what_the_file_does_not_hold(tmp_path, start):
    np.save(tmp_path / "y.npy", Y)
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as content:
        content.writestr("x_train.npy", start + bytes(120))
        content.write(tmp_path / "y.npy", "y_train.npy")
    with pytest.raises(UserError, match=r"cannot read '.*' as an \.npz file|x_train is .*; expected uint8") as e:
        sources.open_splits(f"arrays({str(tmp_path / 'data.npz')!r})")
    assert len(str(e.value)) < 500


def test_what_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 400)
    with pytest.raises(UserError, match=r"data.npz needs 4\d\d bytes of memory, but this process may use 400 bytes"):
        sources.open_splits(npz(tmp_path, x_train=X, y_train=Y))


def test_a_zip_that_lies_of_a_size_takes_no_more_memory(tmp_path):
    path = tmp_path / "data.npz"
    npz(tmp_path, x_train=X, y_train=Y)
    whole = path.read_bytes()
    entry = whole.index(b"PK\1\2")
    path.write_bytes(whole[: entry + 24] + b"\xf0\xff\xff\x7f" + whole[entry + 28 :])  # the unpacked size
    source = sources.open_splits(f"arrays({str(path)!r})")["train"]
    np.testing.assert_array_equal(source.read(np.arange(6))["image"], X[..., None])


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    """Opening a named pipe would wait forever for a writer."""
    os.mkfifo(tmp_path / "data.npz")
    for path in (tmp_path / "data.npz", "/dev/zero"):
        with pytest.raises(UserError, match="is a folder, pipe or device"):
            sources.open_splits(f"arrays({str(path)!r})")
    os.mkfifo(tmp_path / "weights.npy")
    with pytest.raises(UserError, match="is a folder, pipe or device"):
        load_array(str(tmp_path / "weights.npy"))


N, K = 40, 3
X40 = np.random.default_rng(0).integers(0, 256, (N, 5, 4, 1), np.uint8)
T = np.random.default_rng(1).normal(size=(N, K)).astype(np.float32)
NAMES = ("height", "width", "age")


def regression(targets=T):
    """A user's own source with targets, whose images are decoded each time."""
    return Source(N, lambda ids: {"image": X40[ids]}, NAMES, "own", targets)


@pytest.mark.parametrize(("dtype", "shape"), [("f8", (K,)), ("f4", ()), ("u1", (14,))])
def test_arrays_read_targets(tmp_path, dtype, shape):
    y = (np.random.default_rng(2).normal(size=(N, *shape)) * 5).astype(dtype)
    source = sources.open_splits(npz(tmp_path, x_train=X40, train_targets=y, test_images=X40, test_targets=y))["test"]
    examples = read_examples(source, np.array([3, 1, 3]))
    assert examples.keys() == {"image", "target"}
    assert examples["target"].dtype == np.float32
    np.testing.assert_array_equal(examples["target"], y.reshape(N, -1)[[3, 1, 3]].astype(np.float32))
    assert source.target_names == (tuple(map(str, range(*shape))) if shape else ("target",))


@pytest.mark.parametrize(("data", "message"), [
    ({"x_train": X40, "y_train": T[:, 0] > 0, "train_targets": T}, "holds x_train and "),
    ({"x_train": X40, "train_targets": T, "x_test": X40, "y_test": np.arange(N)},
     "holds y_test and train_targets; give every split labels, or every split targets"),
    ({"x_train": X40, "train_targets": np.where(T.max() == T, np.nan, T)}, "is nan; targets must be finite"),
    ({"x_train": X40, "train_targets": np.where(T.max() == T, 1e39, T.astype(float))}, "is inf; targets must be"),
    ({"x_train": X40, "train_targets": T[:5]}, "x_train is uint8[40, 5, 4, 1] and train_targets is float32[5, 3]"),
    ({"x_train": X40, "train_targets": T.astype(complex)}, "train_targets is complex128[40, 3]; expected"),
    ({"x_train": X40, "train_targets": T, "class_names": ["a", "b"]}, "targets are float32[40, 3]; expected"),
    ({"x_train": X40, "train_targets": T, "class_names": NAMES, "target_names": NAMES}, "keep one"),
    ({"x_train": X40, "train_targets": T, "x_test": X40, "test_targets": T[:, :2]}, "test_targets: Source: targets"),
])  # fmt: skip
def test_targets_in_arrays_are_checked(tmp_path, data, message):
    with pytest.raises(UserError) as e:
        sources.open_splits(npz(tmp_path, **data))
    assert message in str(e.value)


def test_splits_read_targets():
    base = {"train": regression(), "extra": regression(-T), "labels": sources.fake(8, (5, 4, 1))["train"]}
    source = sources.take_split(base, "train[30:]+extra[5:20]")
    order = np.random.default_rng(0).permutation(source.size)
    examples = read_examples(source, order)
    assert examples.keys() == {"image", "target"}
    np.testing.assert_array_equal(examples["target"], np.concatenate([T[30:], -T[5:20]])[order])
    assert source.target_names == NAMES
    with pytest.raises(UserError, match=r"split 'train\+labels': it joins splits with labels and splits with targets"):
        sources.take_split(base, "train+labels")


@pytest.mark.parametrize("place", ["host", "device"])
def test_batches_hold_the_targets_of_their_examples(place):
    """With either placement, interleaved for several seeds, and with the shapes that the programs expect."""
    mesh, images = sharding.make_mesh(), stream.Images(regression(), "decode(1)", 5)
    spec = stream.StreamSpec(5, 16, num_seeds=2)
    shapes = placement.batch_shape(spec.rows, images.shape, K, mesh)
    for step, batch in placement.batches(place, images, spec, range(2, 5), mesh):
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), shapes
        )
        for seed in (5, 6):
            ids = sampling.example_ids(seed, step, 16, N)
            np.testing.assert_array_equal(batch["target"][seed - 5 :: 2], T[ids])
            np.testing.assert_array_equal(batch["image"][seed - 5 :: 2], X40[ids])


def test_targets_of_all_examples_and_streams_fit_the_loss(fake_config):
    soft = np.eye(3, dtype=np.float32)[np.arange(N) % 3]
    fits = regression(soft)
    wrong = dataclasses.replace(regression(np.where(np.arange(N)[:, None] == 37, 40 * soft - 3, soft)),
                                example_name="cats/{}.jpg".format)  # fmt: skip
    fake_config.loss, fake_config.preprocess = "sigmoid", "decode(1)"
    programs = programs_for_images(fake_config, stream.Images(fits, "decode(1)"))
    for source, extra in ((wrong, fits), (fits, wrong)):
        images = stream.Images(source, "decode(1)", extra={"more": stream.Images(extra, "decode(1)")})
        with pytest.raises(UserError, match=r"^loss='sigmoid': cats/37.jpg has the target \[-3.0, 37.0, -3.0\]"):
            check_targets(programs, images)
    check_targets(programs, stream.Images(fits, "decode(1)"))
