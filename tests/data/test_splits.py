"""Splits of a source, against TFDS's own parsing of the same text."""

import types

import pytest
import tensorflow_datasets as tfds
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import splits


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
