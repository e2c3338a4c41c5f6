"""Sources: random access to examples as they are in the files, and an answer to every file that is not there."""

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources


def open_one(text, split="train", **dirs):
    return sources.take_split(sources.open_splits(text, **dirs), split)


def everything(source):
    return source.read(np.arange(len(source)))


# --- digits ---


def test_digits_are_scikit_learns_scaled_to_a_byte_and_split_by_class():
    base = sources.open_splits("digits")
    train, test = everything(base["train"]), everything(base["test"])
    assert (len(base["train"]), len(base["test"])) == (1437, 360)
    assert (train["image"].shape, train["image"].dtype) == ((1437, 8, 8, 1), np.uint8)
    data = load_digits()
    # 0 to 16 become 0 to 255; every image of the original is there once, with its label.
    scaled = [round(v * 255 / 16) for v in range(17)]
    expected = sorted((bytes(scaled[int(v)] for v in x), int(y)) for x, y in zip(data.data, data.target, strict=True))
    found = [(x.tobytes(), int(y)) for part in (train, test) for x, y in zip(part["image"], part["label"], strict=True)]
    assert sorted(found) == expected
    # Stratified: each class has its share of the 360 within one example.
    share = np.bincount(data.target) * 360 / 1797
    assert np.all(np.abs(np.bincount(test["label"]) - share) < 1)
    assert base["train"].class_names == tuple("0123456789")
    assert [s.fingerprint() for s in sources.open_splits("digits").values()] == [s.fingerprint() for s in base.values()]


# --- arrays ---

X = np.random.default_rng(0).integers(0, 256, (6, 4, 5), np.uint8)
Y = np.array([0, 2, 1, 2, 0, 1])


def npz(path, **data):
    np.savez(path / "data.npz", **data)
    return f"arrays({str(path / 'data.npz')!r})"


@pytest.mark.parametrize("column", [False, True])  # Keras's cifar10 has labels [n, 1]
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_arrays_are_read_from_npz(tmp_path, channels, column):
    x = X if channels is None else np.repeat(X[..., None], channels, -1)
    y = (Y[:, None] if column else Y).astype(np.uint8)
    base = sources.open_splits(npz(tmp_path, x_train=x, y_train=y, x_extra=x[:2], y_extra=y[:2], other=np.zeros(3)))
    assert {name: len(s) for name, s in base.items()} == {"train": 6, "extra": 2}
    examples = base["train"].read(np.array([4, 1, 4]))
    np.testing.assert_array_equal(examples["image"], (x if channels else x[..., None])[[4, 1, 4]])
    assert (examples["label"].tolist(), examples["label"].dtype) == ([0, 2, 0], np.int32)
    assert base["extra"].class_names == ("0", "1", "2")  # those of all splits


def test_arrays_take_class_names_and_the_home_directory(tmp_path, monkeypatch):
    npz(tmp_path, x_train=X, y_train=Y, class_names=np.array(["cat", "dog", "emu", "fox"]))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_one("arrays('~/data.npz')").class_names == ("cat", "dog", "emu", "fox")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"images": X, "labels": Y}, "expected x_NAME and y_NAME, such as x_train and y_train"),
        ({"x_train": X}, "holds ['x_train']; expected x_NAME and y_NAME"),
        ({"x_train": X / 255, "y_train": Y}, "x_train is float64[6, 4, 5] for 6 labels"),
        ({"x_train": X[0], "y_train": Y}, "x_train is uint8[4, 5] for 6 labels"),
        ({"x_train": np.uint8(3), "y_train": Y}, "x_train is uint8[] for 6 labels"),
        ({"x_train": X, "y_train": Y[:5]}, "x_train is uint8[6, 4, 5] for 5 labels"),
        ({"x_train": X[:0], "y_train": Y[:0]}, "x_train is uint8[0, 4, 5] for 0 labels"),
        ({"x_train": X, "y_train": Y / 2}, "for 6 labels, float64; expected"),
        ({"x_train": X, "y_train": np.array(list("abcabc"))}, "for 6 labels, <U1; expected"),
        ({"x_train": X, "y_train": Y - 1}, "y_train lies outside the 2 classes"),
        ({"x_train": X, "y_train": Y, "class_names": ["a", "b"]}, "y_train lies outside the 2 classes"),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y.astype(float)}, "x_test is uint8[6, 4, 5] for 6 labels"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, data, message):
    with pytest.raises(UserError) as e:
        sources.open_splits(npz(tmp_path, **data))
    assert message in str(e.value)
    assert str(tmp_path / "data.npz") in str(e.value)


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "text", "npy", "cut short", "damaged"])
def test_what_is_no_npz_file_is_named(tmp_path, kind):
    file = tmp_path / "data.npz"
    np.savez_compressed(file, x_train=X, y_train=Y)
    whole = file.read_bytes()
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "npy":
        with file.open("wb") as stream:
            np.save(stream, X)
    elif kind != "missing":
        start = whole.index(b"x_train.npy") + 40
        damaged = whole[:start] + bytes(40) + whole[start + 40 :]
        file.write_bytes({"empty": b"", "text": b"hello", "cut short": whole[:-50], "damaged": damaged}[kind])
    with pytest.raises(UserError, match=r"cannot read '.*data\.npz' as an \.npz file"):
        sources.open_splits(f"arrays({str(file)!r})")


# --- fake ---


def test_fake_examples_are_a_function_of_the_id_alone():
    base = sources.open_splits("fake(500, (6, 7, 3), 4)")
    whole = everything(base["train"])
    assert whole["image"].shape == (500, 6, 7, 3)
    np.testing.assert_array_equal(whole["label"], np.arange(500) % 4)
    ids = np.random.default_rng(0).permutation(500)
    some = base["train"].read(ids)
    np.testing.assert_array_equal(some["image"], whole["image"][ids])
    np.testing.assert_array_equal(some["label"], ids % 4)
    other = everything(base["test"])["image"]
    assert len({x.tobytes() for x in [*whole["image"], *other]}) == 1000  # no two alike, in either split
    assert len({s.fingerprint() for s in (*base.values(), open_one("fake(500, (6, 7, 3), 5)"))}) == 3


def test_fake_pixels_are_uniform_noise_and_a_bright_band_that_tells_the_class():
    examples = everything(open_one("fake(2000, (8, 8, 1), 4)"))
    pixels = examples["image"].reshape(2000, 4, 16)  # a band of two rows for each class
    own = examples["label"][:, None] == np.arange(4)
    np.testing.assert_array_equal(pixels >= 128, np.repeat(own[..., None], 16, -1))
    noise = (pixels & 127).reshape(2000, 64)
    assert stats.chisquare(np.bincount(noise.ravel(), minlength=128)).pvalue > 1e-4
    for a, b in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:])):  # neighbours in an image, and images
        pairs = (a.astype(int) // 8 * 16 + b // 8).ravel()
        assert stats.chisquare(np.bincount(pairs, minlength=256)).pvalue > 1e-4


# --- SplitSource ---


def test_a_split_reads_across_its_parts_in_order():
    base = sources.open_splits("fake(50, (3, 3, 1), 5)")
    source = sources.take_split(base, "train[40:]+test[:20%]+train[3:4]")
    a, b, c = np.arange(40, 50), np.arange(10), np.array([3])
    expected = np.concatenate([base[n].read(ids)["image"] for n, ids in (("train", a), ("test", b), ("train", c))])
    assert len(source) == 21
    ids = np.array([20, 9, 10, 0, 19, 9])
    examples = source.read(ids)
    np.testing.assert_array_equal(np.stack(examples["image"]), expected[ids])
    np.testing.assert_array_equal(examples["label"], np.concatenate([a, b, c])[ids] % 5)
    assert source.name(20) == "example 3"
    assert source.name(0) == "example 40"
    assert source.class_names == tuple("01234")


def test_the_whole_of_a_base_split_is_the_base_split():
    base = sources.open_splits("digits")
    assert sources.take_split(base, "train") is sources.take_split(base, "train[:100%]") is base["train"]


def test_fingerprints_differ_by_examples_and_order():
    base = sources.open_splits("fake(50, (3, 3, 1), 5)")
    texts = ["train", "test", "train[:49]", "train[1:]", "train[:25]+train[25:]", "train[25:]+train[:25]", "train+test"]
    assert len({sources.take_split(base, text).fingerprint() for text in texts}) == len(texts)
    x, y, names = X[..., None], Y.astype(np.int32), ("a", "b", "c")
    one_bit = x.copy()
    one_bit[5, 3, 4, 0] ^= 1
    variants = [(x, y, names), (one_bit, y, names), (x, y[::-1], names), (x[::-1], y, names)]
    variants += [(x.reshape(6, 5, 4, 1), y, names), (x, y, ("a", "b", "d"))]
    assert len({sources.ArraySource(*v).fingerprint() for v in variants}) == len(variants)


def test_an_unknown_source_gives_the_nearest():
    with pytest.raises(UserError, match="unknown source 'digit': did you mean 'digits'"):
        sources.open_splits("digit")


# --- TFDS ---
