"""Sources: random access to examples as stored, and an error for every missing file."""

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.data.file_source import FileSource


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
    split = train_test_split(data.target, test_size=360, stratify=data.target, random_state=0)
    assert all(np.array_equal(part["label"], labels) for part, labels in zip((train, test), split, strict=True))
    assert base["train"].class_names == tuple("0123456789")
    assert [s.fingerprint() for s in sources.open_splits("digits").values()] == [s.fingerprint() for s in base.values()]


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
    more = sources.open_splits("fake(500, (6, 7, 3), 5)")["train"]
    assert len({s.fingerprint() for s in (*base.values(), more)}) == 3


@pytest.mark.parametrize("arguments", [
    "0", "-1", "2.0", "True", "2**49", "'8'", "None", "n=9999999999999999999999",
    "shape=(8, 8)", "shape=(0, 8, 1)", "shape=(8, -8, 1)", "shape=(8, 8, 5)", "shape=(8, 8.0, 1)", "shape=8",
    "shape='888'", "shape=(100000, 100000, 3)", "shape={}", "shape=(8, (8,), 1)",
    "classes=0", "classes=-3", "classes=1000001", "classes=2.5", "classes='10'", "classes=[]",
])  # fmt: skip
def test_fake_examples_of_no_number_or_size_are_refused(arguments):
    with pytest.raises(UserError) as e:
        sources.open_splits(f"fake({arguments.replace('2**49', str(2**49))})")
    assert str(e.value).startswith("fake(")
    assert "such as (28, 28, 1)" in str(e.value) or "a whole number from 1 to" in str(e.value)
    assert "\n" not in str(e.value)


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


def own(n, names=("a", "b"), labels=None):
    return sources.ArraySource(np.zeros((n, 2, 2, 1), np.uint8), np.arange(n if labels is None else labels) % 2, names)


def test_splits_of_different_classes_do_not_join():
    """The labels of the second part meant the classes of the first one."""
    base = {"train": own(4), "same": own(3), "more": own(3, ("b", "a"))}
    assert len(sources.take_split(base, "train+same")) == 7
    assert sources.take_split(base, "more").class_names == ("b", "a")
    with pytest.raises(UserError, match=r"split 'train\+more' joins splits with different class_names"):
        sources.take_split(base, "train+more")


@pytest.mark.parametrize("labels", [3, 5])
def test_labels_of_other_examples_are_refused(labels):
    """As a part of a source has them that keeps the labels of the whole: they were taken for the first examples'."""
    for read in (sources.known_labels, sources.read_labels, sources.class_counts):
        with pytest.raises(UserError, match=rf"ArraySource has labels \[{labels}\] for 4 examples"):
            read(own(4, labels=labels))


@pytest.mark.parametrize(("labels", "message"), [
    ([1, 2, 1, 2], r"ArraySource has labels from 1 to 2 for 2 class_names; number the classes from 0 to 1"),
    (["a", "b", "a", "b"], r"ArraySource has 'labels' <U1\[4\] for 4 images; return integers \[4\]"),
])  # fmt: skip
def test_known_labels_are_checked_like_those_that_are_read(labels, message):
    """Labels from 1 on gave classes of 0, 2 and 2 examples, and text a traceback."""
    source = dataclasses.replace(own(4), labels=labels)
    for part in (source, sources.take_split({"train": source}, "train[1:]")):
        with pytest.raises(UserError, match=message):
            sources.class_counts(part)
    assert sources.class_counts(dataclasses.replace(source, labels=[1, 0, 1, 1])).tolist() == [1, 3]


def test_a_slice_has_the_attributes_of_its_source():
    """A factory of a sampling that reads `source.labels` failed on `train[:90%]`."""
    pixels, numbers = np.zeros((4, 2, 2, 1), np.uint8), np.arange(4)
    array = sources.ArraySource(pixels, numbers % 2, ("a", "b"), weights=numbers)
    files = FileSource(Path("x"), tuple("abcd"), numbers % 2, (1,) * 4, ("a", "b"), columns={"age": numbers})
    base = {"train": array, "extra": array, "files": files}
    part = sources.take_split(base, "train[1:3]+extra[:1]")
    assert (part.labels.tolist(), part.weights.tolist(), part.column().tolist()) == ([1, 0, 0], [1, 2, 0], [1, 2, 0])
    part = sources.take_split(base, "files[1:3]")
    assert (part.labels.tolist(), part.files, part.column("age").tolist()) == ([1, 0], ("b", "c"), [1.0, 2.0])
    part = sources.take_split({"train": sources.fake(4, (2, 2, 1), 2)["train"]}, "train[1:]")
    assert [part.labels, part.weights, part.files] == [None, None, None]


def test_an_attribute_called_name_need_not_be_a_function():
    """A text there broke `evaluate --predictions`, `show-batch` and `report` after the training."""
    source = types.SimpleNamespace(name="stripes")
    assert [sources.example_name(source, 3), sources.example_name(source, 3, str)] == ["example 3", "3"]
    source.name = "cats/{}.jpg".format
    assert sources.example_name(source, 3, str) == "cats/3.jpg"


def test_fingerprints_differ_by_examples_and_order():
    base = sources.open_splits("fake(50, (3, 3, 1), 5)")
    texts = ["train", "test", "train[:49]", "train[1:]", "train[:25]+train[25:]", "train[25:]+train[:25]", "train+test"]
    assert len({sources.take_split(base, text).fingerprint() for text in texts}) == len(texts)
    x = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 1), np.uint8)
    y, names = np.array([0, 2, 1, 2, 0, 1], np.int32), ("a", "b", "c")
    one_bit = x.copy()
    one_bit[5, 3, 4, 0] ^= 1
    variants = [(x, y, names), (one_bit, y, names), (x, y[::-1], names), (x[::-1], y, names)]
    variants += [(x.reshape(6, 5, 4, 1), y, names), (x, y, ("a", "b", "d"))]
    assert len({sources.ArraySource(*v).fingerprint() for v in variants}) == len(variants)


def test_an_unknown_source_gives_the_nearest():
    with pytest.raises(UserError, match="unknown source 'digit': did you mean 'digits'"):
        sources.open_splits("digit")
