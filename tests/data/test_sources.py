"""Sources: random access to examples as they are in the files, and an answer to every file that is not there."""

import gzip
import os
import socket
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from scipy import stats
from sklearn.datasets import load_digits

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode, prepare, sources


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


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """27 small pictures that need no download."""

    VERSION = tfds.core.Version("1.2.0")

    LABEL = tfds.features.ClassLabel(names=["cat", "dog", "emu"])
    FEATURES = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(5, 4, 3)), "label": LABEL})

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=self.FEATURES)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 20), "test": self._generate_examples(20, 27)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            # The last one has no label, as in a test set whose labels are secret.
            yield i, {"image": picture(i), "label": -1 if i == 26 else i % 3}


class TinyPairs(TinyPictures):
    """No single image and label."""

    FEATURES = tfds.features.FeaturesDict({"a": tfds.features.Image(), "b": tfds.features.Image()})


class TinyAges(TinyPictures):
    """A label that is no class."""

    FEATURES = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int32)})


def picture(i):
    return np.random.default_rng(i).integers(0, 256, (5, 4, 3), np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    return sources.open_splits("tfds('tiny_pictures')", data_dir=data_dir), data_dir


def test_tfds_examples_are_read_in_any_order_still_encoded(tiny):
    base, data_dir = tiny
    assert {name: len(s) for name, s in base.items()} == {"train": 20, "test": 7}
    assert list(Path(data_dir).rglob("*train.array_record*"))
    assert base["train"].class_names == ("cat", "dog", "emu")
    which = {picture(i).tobytes(): i for i in range(27)}  # TFDS shuffles when it prepares
    ids = np.array([13, 0, 19, 13, 5])
    whole, some = everything(base["train"]), base["train"].read(ids)
    assert some["image"] == [whole["image"][i] for i in ids]
    assert all(image.startswith(b"\x89PNG") for image in whole["image"])
    examples = [which[decode.decode(image).tobytes()] for image in whole["image"]]
    assert sorted(examples) == list(range(20))
    np.testing.assert_array_equal(whole["label"], np.array(examples) % 3)
    np.testing.assert_array_equal(some["label"], whole["label"][ids])


def test_tfds_is_prepared_once_and_has_a_fingerprint(tiny):
    base, data_dir = tiny
    before = {p: p.stat().st_mtime_ns for p in Path(data_dir).rglob("*")}
    again = sources.open_splits(f"tfds('tiny_pictures:1.2.0', data_dir={data_dir!r})")
    assert {p: p.stat().st_mtime_ns for p in Path(data_dir).rglob("*")} == before
    assert again["train"].fingerprint() == base["train"].fingerprint() != base["test"].fingerprint()


def test_an_example_without_a_label_is_named(tiny):
    with pytest.raises(UserError, match=r"example \d of 'tiny_pictures/1.2.0 test .* has no label; use another split"):
        everything(tiny[0]["test"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_picture", "unknown TFDS data set 'tiny_picture': did you mean 'tiny_pictures'"),
        ("fashion_mnits", "did you mean 'fashion_mnist'"),
        ("tiny_pictures:9.9.9", "cannot be loaded at version 9.9.9"),
        ("a b", "TFDS data set 'a b'"),
        ("tiny_pairs", "holds ['a', 'b']; image classification needs image and label"),
        ("tiny_ages", "expected a ClassLabel"),
    ],
)
def test_tfds_names_that_cannot_be_used(tmp_path, name, message):
    with pytest.raises(UserError) as e:
        sources.open_splits(f"tfds({name!r})", data_dir=str(tmp_path))
    assert message in str(e.value)


def test_data_prepared_in_another_format_is_told_with_the_mend(tmp_path):
    tfds.builder("tiny_pictures", data_dir=tmp_path, file_format="tfrecord").download_and_prepare()
    with pytest.raises(UserError, match=r"TFRECORD.*; pass another --config.data.data_dir"):
        sources.open_splits("tfds('tiny_pictures')", data_dir=str(tmp_path))


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    [monkeypatch.delenv(name) for name in list(os.environ) if name.lower().endswith("_proxy")]


FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def test_without_a_network_the_files_and_manual_dir_are_named(tmp_path, no_network):
    (tmp_path / FILES[0]).write_bytes(b"")
    for manual_dir, missing in (("", FILES), (str(tmp_path), FILES[1:])):
        with pytest.raises(UserError) as e:
            sources.open_splits("tfds('fashion_mnist')", data_dir=str(tmp_path / "data"), manual_dir=manual_dir)
        assert "no network for TFDS data set 'fashion_mnist'" in str(e.value)
        assert "put them in one directory and pass it as --config.data.manual_dir: http" in str(e.value)
        assert [f for f in FILES if f"/{f}" in str(e.value)] == missing


def test_files_are_looked_for_by_the_name_that_tfds_wants_them_under(tmp_path, no_network):
    urls = ["http://host/get?id=1", "http://host/b.zip"]
    infos = dict(zip(urls, (SimpleNamespace(filename="a.zip"), SimpleNamespace(filename="b.zip")), strict=True))
    builder = SimpleNamespace(name="x", url_infos=infos, builder_configs={})
    (tmp_path / "b.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"manual_dir: http://host/get\?id=1 \(as a\.zip\)$"):
        prepare._check_files(builder, str(tmp_path))
    # With several configs the files of all are recorded, and one config may well need no more than those there.
    prepare._check_files(SimpleNamespace(**vars(builder) | {"builder_configs": {"p": 0, "q": 0}}), str(tmp_path))
    (tmp_path / "a.zip").write_bytes(b"")
    prepare._check_files(builder, str(tmp_path))


def test_a_missing_manual_dir_is_named(tmp_path, no_network):
    with pytest.raises(UserError, match=r"data\.manual_dir: there is no directory 'no/where'"):
        sources.open_splits("tfds('fashion_mnist')", data_dir=str(tmp_path), manual_dir="no/where")


def test_a_damaged_file_in_manual_dir_is_named(tmp_path, no_network):
    for file in FILES:
        (tmp_path / file).write_bytes(gzip.compress(b"not the original"))
    with pytest.raises(UserError, match=r"could not prepare 'fashion_mnist' .*-ubyte\.gz.* has wrong checksum"):
        sources.open_splits("tfds('fashion_mnist')", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path))


ORIGINAL = os.environ.get("IMGCLF_FASHION_MNIST_DIR", "")


@pytest.mark.skipif(not ORIGINAL, reason="IMGCLF_FASHION_MNIST_DIR does not name the folder of the original files")
def test_fashion_mnist_from_the_original_files_pixel_by_pixel(tmp_path, no_network):
    base = sources.open_splits("tfds('fashion_mnist')", data_dir=str(tmp_path), manual_dir=ORIGINAL)
    assert {name: len(s) for name, s in base.items()} == {"train": 60_000, "test": 10_000}
    assert base["train"].class_names[:2] == ("T-shirt/top", "Trouser")
    for split, part in (("train", "train"), ("test", "t10k")):
        images, labels = (zlib.decompress(Path(ORIGINAL, f"{part}-{kind}-ubyte.gz").read_bytes(), 31)
                          for kind in ("images-idx3", "labels-idx1"))  # fmt: skip
        images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 784)
        expected = sorted((x.tobytes(), y) for x, y in zip(images, labels[8:], strict=True))
        examples = everything(base[split])
        pixels = [decode.decode(image, 1).tobytes() for image in examples["image"]]
        assert sorted(zip(pixels, examples["label"].tolist(), strict=True)) == expected
