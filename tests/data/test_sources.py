"""Sources: random access to examples as stored, splits as TFDS parses them, and an error for every missing file."""

import dataclasses
import sys
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources, splits
from imgclf_jax.data.arrays import array_source
from imgclf_jax.data.source import Source, read_examples, read_labels


def everything(source):
    return read_examples(source, np.arange(source.size))


def test_digits_are_scikit_learns_scaled_to_a_byte_and_split_by_class():
    base = sources.open_splits("digits")
    train, test = everything(base["train"]), everything(base["test"])
    assert (base["train"].size, base["test"].size) == (1437, 360)
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
    assert [s.fingerprint for s in sources.open_splits("digits").values()] == [s.fingerprint for s in base.values()]


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
    assert len({s.fingerprint for s in (*base.values(), more)}) == 3


def test_a_split_reads_across_its_parts_in_order():
    base = sources.open_splits("fake(50, (3, 3, 1), 5)")
    source = sources.take_split(base, "train[40:]+test[:20%]+train[3:4]")
    a, b, c = np.arange(40, 50), np.arange(10), np.array([3])
    expected = np.concatenate([base[n].read(ids)["image"] for n, ids in (("train", a), ("test", b), ("train", c))])
    assert source.size == 21
    ids = np.array([20, 9, 10, 0, 19, 9])
    examples = read_examples(source, ids)
    np.testing.assert_array_equal(np.stack(examples["image"]), expected[ids])
    np.testing.assert_array_equal(examples["label"], np.concatenate([a, b, c])[ids] % 5)
    assert source.example_name(20) == "example 3"
    assert source.example_name(0) == "example 40"
    assert source.class_names == tuple("01234")


def own(n, names=("a", "b"), **more):
    return array_source(np.zeros((n, 2, 2, 1), np.uint8), np.arange(n) % 2, names, **more)


def test_a_split_has_the_facts_of_its_parts():
    base = {"train": own(4, weights=np.arange(4)), "bare": own(4), "other": own(3, ("b", "a"))}
    base["extra"] = dataclasses.replace(base["train"], skipped_files=("b", "a"))
    part = sources.take_split(base, "train[1:3]+extra[:1]")
    assert (part.labels.tolist(), part.columns["weight"].tolist()) == ([1, 0, 0], [1, 2, 0])
    assert part.skipped_files == ("a", "b")
    assert sources.take_split(base, "train[1:]+bare").columns == {}
    part = sources.take_split(sources.fake(4, (2, 2, 1), 2), "train[1:]")
    assert (part.labels, part.columns) == (None, {})
    with pytest.raises(UserError, match=r"split 'train\+other': it joins splits with different class_names"):
        sources.take_split(base, "train+other")  # a label would mean another class


@pytest.mark.parametrize(("fields", "message"), [
    ({"size": 0}, "Source(size=0): must be 1 or more"),
    ({"class_names": "ab"}, "Source(class_names='ab'): must be a tuple of different strings"),
    ({"class_names": ("a", "b", "a")}, "Source(class_names=('a', 'b', 'a')): must be"),
    ({"columns": {"weight": [1, 2]}}, "the column 'weight' has 2 values for 4 examples"),
    ({"labels": [0, 1, 0]}, "labels are int64[3] for 4 examples; expected whole numbers [4]"),
    ({"labels": [1, 2, 1, 2]}, "labels are from 1 to 2 for 2 class_names; number the classes from 0 to 1"),
    ({"labels": [0.0, 1.0, 0.0, 1.0]}, "labels are float64[4] for 4 examples"),
    ({"labels": np.zeros((4, 3))}, "targets are float64[4, 3]; expected numbers [4, 2] for 4 examples and 2"),
    ({"labels": np.full((4, 2), np.nan)}, "example 0: target 0 is nan (and 7 more); targets must be finite"),
])  # fmt: skip
def test_what_makes_no_source(fields, message):
    with pytest.raises(UserError) as e:
        Source(**{"size": 4, "read": None, "class_names": ("a", "b"), "fingerprint": "x"} | fields)
    assert message in str(e.value)


@pytest.mark.parametrize(("gives", "message"), [
    (None, "read returns None; return a dict with image and label"),
    ({"image": [0]}, "read returns ['image']; return a dict with image and label"),
    ({"image": [0, 1], "label": [0]}, "read returns 2 images for 1 ids; return one per id, in their order"),
    ({"image": [0], "label": [-1]}, "labels are from -1 to -1 for 2 class_names; number the classes from 0 to 1"),
    ({"image": [0], "label": [0.7]}, "labels are float64[1] for 1 examples; expected whole"),
    ({"image": [0], "label": [0, 0]}, "labels are int64[2] for 1 examples"),
])  # fmt: skip
def test_what_a_read_must_return(gives, message):
    base = {"train": Source(4, lambda ids: gives, ("a", "b"), "x")}
    for split in ("train", "train[:1]+train[1:]"):
        with pytest.raises(UserError) as e:
            read_examples(sources.take_split(base, split), np.zeros(1, np.int64))
        assert message in str(e.value)


@pytest.mark.parametrize("opened", [None, own(4), {}, {"train": 3}, {"train": own(4), "test": None}])
def test_what_the_function_of_a_source_must_return(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "own", types.SimpleNamespace(data=lambda: opened))
    with pytest.raises(UserError, match=r"^data.source='own:data\(\)' returns .*; return a dict {'train': source} of"):
        sources.open_splits("own:data()")


def test_fingerprints_differ_by_examples_and_order():
    base = sources.open_splits("fake(50, (3, 3, 1), 5)")
    texts = ["train", "test", "train[:49]", "train[1:]", "train[:25]+train[25:]", "train[25:]+train[:25]", "train+test"]
    assert len({sources.take_split(base, text).fingerprint for text in texts}) == len(texts)
    x = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 1), np.uint8)
    y, names = np.array([0, 2, 1, 2, 0, 1], np.int32), ("a", "b", "c")
    one_bit = x.copy()
    one_bit[5, 3, 4, 0] ^= 1
    variants = [(x, y, names), (one_bit, y, names), (x, y[::-1], names), (x[::-1], y, names)]
    variants += [(x.reshape(6, 5, 4, 1), y, names), (x, y, ("a", "b", "d")), (x, np.eye(3)[y], names)]
    assert len({array_source(*v).fingerprint for v in variants}) == len(variants)


def test_labels_by_one_pass_over_what_has_no_known_ones():
    def read(ids):
        return {"image": [b""] * len(ids), "label": (ids % 4 // 2).astype(np.int32)}

    np.testing.assert_array_equal(read_labels(Source(2501, read, ("a", "b"), "")), np.arange(2501) % 4 // 2)


def by_tfds(text, sizes):
    infos = {name: types.SimpleNamespace(num_examples=n) for name, n in sizes.items()}  # all that TFDS needs of them
    absolute = tfds.core.splits.AbstractSplit.from_spec(text).to_absolute(infos)
    return [(a.splitname, a.from_ or 0, sizes[a.splitname] if a.to is None else a.to) for a in absolute]


NUMBERS = st.one_of(st.integers(-130, 130).map(str), st.integers(-3000, 3000).map(str), st.just("-0"))
PERCENTS = st.one_of(st.integers(-100, 100).map("{}%".format), st.integers(-1000, 1000).map(lambda i: f"{i / 10}%"))
SLICES = st.one_of(*(st.tuples(b | st.just(""), b | st.just("")).filter(any).map("[{0[0]}:{0[1]}]".format)
                     for b in (NUMBERS, PERCENTS)))  # fmt: skip
PIECES = st.tuples(st.sampled_from(["train", "test", "val-2"]), SLICES | st.just("")).map("".join)


def rounds_to_nothing(text, sizes):
    """Whether a negative percentage rounds to no example; TFDS then takes it as the start of the split."""
    for piece in text.split("+"):
        name, _, bounds = piece.strip().rstrip("]").partition("[")
        for b in bounds.split(":"):
            if b.endswith("%") and float(b[:-1]) < 0 and round(float(b[:-1]) * sizes[name] / 100) == 0:
                return True
    return False


@settings(max_examples=400)
@given(st.lists(PIECES, min_size=1, max_size=3).map(" + ".join), st.integers(1, 130), st.integers(1, 3000))
def test_splits_resolve_as_tfds_resolves_them(text, small, large):
    sizes = {"train": large, "test": small, "val-2": 7}
    assume(not rounds_to_nothing(text, sizes))
    try:
        expected = by_tfds(text, sizes)
    except ValueError:
        expected = None  # outside of the split, which TFDS refuses
    if expected is None or any(start >= stop for _, start, stop in expected):
        with pytest.raises(UserError, match=r"reaches beyond|has no examples"):
            splits.resolve(text, sizes)
    else:
        assert [(p.name, p.start, p.stop) for p in splits.resolve(text, sizes)] == expected


def test_counting_takes_no_memory_for_examples():
    """Overlapping and repeated parts count once, for any number of examples."""
    n = 2**48
    evals = {"a": f"train[{n // 4}:{n // 2 + 5}]+train[:3]"}
    assert splits.count_shared(f"train[:{n // 2}]", evals, {"train": n}) == {"a": (n // 4 + 3, n // 4 + 8)}


@pytest.mark.parametrize(("text", "counts"), [
    ("test[:60%]+test[40%:]", (432, 360)), ("test+test", (720, 360)), ("train+test[5:6]+test[:9]", (1010, 1009)),
    ("test[:3]+test[3:]", None), ("test[3:]+train+test[:3]", None),
])  # fmt: skip
def test_an_evaluation_set_has_no_example_twice(text, counts):
    sizes = {"train": 1000, "test": 360}
    if counts is None:
        splits.check_disjoint(text, sizes)
    else:
        with pytest.raises(UserError, match="overlap: they have {} examples, of which only {} differ".format(*counts)):
            splits.check_disjoint(text, sizes)
