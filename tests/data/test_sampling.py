"""Sampling is a pure function of (seed, position), with the frequencies that each sampling promises."""

import dataclasses
import math
import re
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import placement, sampling, sources, stream
from imgclf_jax.data.arrays import array_source

N = 60
COUNTS = (30, 20, 9, 0, 1)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS)).astype(np.int32)
X = np.arange(N, dtype=np.uint8).reshape(N, 1, 1, 1)
WEIGHTS = np.random.default_rng(1).integers(0, 5, N) / 4


def source(**more):
    return array_source(X, LABELS, tuple("abcde"), **more)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    np.save(folder / "weights.npy", WEIGHTS)
    np.save(folder / "ids.npy", np.array([5, 50, 7, 0]))
    return folder


def own(key, positions, n, shift=1):
    return ((positions + key % np.uint64(n)).astype(np.int64) + shift) % n


def make_own(source, of_class):
    (places,) = np.nonzero(source.labels == of_class)

    def ids(key, positions, n):
        return places[(positions + key % np.uint64(7)).astype(np.int64) % len(places)]

    ids.epoch = len(places)
    return ids


SPECS = ["permutation", "balanced", "weighted", "weighted('F/weights.npy')", "subset('F/ids.npy')",
         f"{__name__}:own(shift=3)",
         f"{__name__}:make_own(of_class=1)"]  # fmt: skip


def build(text, files=None, given=None):
    given = given or source(weights=WEIGHTS)
    return sampling.build(text.replace("F/", f"{files}/"), given)


@pytest.mark.parametrize("text", SPECS)
@settings(max_examples=15)
@given(st.data())
def test_an_id_follows_from_the_seed_and_its_position_alone(files, text, data):
    """Whatever other positions the call asks for, in any order and of any size."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    positions = np.array(data.draw(st.lists(st.integers(0, 10**12), min_size=1, max_size=12)))
    first, second = build(text, files), build(text, files)
    whole = first.ids(seed, positions)
    assert (whole.dtype, whole.shape) == (np.int64, positions.shape)
    assert whole.min() >= 0
    assert whole.max() < N
    order = data.draw(st.permutations(range(len(positions))))
    np.testing.assert_array_equal(second.ids(seed, positions[order]), whole[order])
    assert second.ids(seed, positions[:1]).tolist() == whole[:1].tolist()


@pytest.mark.parametrize(("text", "ids"), [
    ("balanced", [20, 15, 50, 10, 36, 13, 50, 39]), ("weighted", [45, 54, 10, 3, 21, 10, 26, 47]),
    ("subset('F/ids.npy')", [7, 50, 0, 5, 50, 0, 5, 50]),
])  # fmt: skip
def test_known_answers(files, text, ids):
    """Our own recorded output: another order would invalidate every published seed."""
    sampler = build(text, files)
    assert [*sampler.ids(3, np.arange(5)), *sampler.ids(2**32 - 1, 10**9 + np.arange(3))] == ids


@pytest.mark.parametrize("n", [1, 2, 3, 7, 32, 33, 300])
def test_shuffles_are_exact_permutations_that_are_all_alike(n):
    """Each element is equally likely at each position, and no order of three is favored."""
    keys = np.arange(600, dtype=np.uint64)
    out = sampling.shuffle(np.tile(np.arange(n), 600), np.full(600 * n, n), sampling._mix(np.repeat(keys, n)))
    out = out.reshape(600, n)
    np.testing.assert_array_equal(np.sort(out, 1), np.tile(np.arange(n), (600, 1)))
    if n > 1:
        counts = np.array([np.bincount(out[:, place], minlength=n) for place in range(min(n, 7))])
        assert stats.chisquare(counts.ravel()).pvalue > 1e-3
    if n == 3:
        assert stats.chisquare(np.unique(out, axis=0, return_counts=True)[1]).pvalue > 1e-3


def chi_square(drawn, expected):
    some = expected > 0
    assert drawn[~some].sum() == 0
    return stats.chisquare(drawn[some], expected[some]).pvalue


def test_weights_are_the_frequencies():
    """Over positions, and over seeds at one position."""
    sampler, m = build("weighted"), 40_000
    ids = sampler.ids(3, np.arange(m))
    p = WEIGHTS / WEIGHTS.sum()
    assert chi_square(np.bincount(ids, minlength=N), m * p) > 1e-3
    by_seed = np.array([sampler.ids(seed, np.array([10**9]))[0] for seed in range(4000)])
    assert chi_square(np.bincount(by_seed, minlength=N), 4000 * p) > 1e-3


def test_balanced_gives_each_class_its_turn_and_each_example_its_share():
    """Four of five classes have examples. Any complete round has each class once; 30 rounds have each of `a` once."""
    sampler = build("balanced")
    ids = sampler.ids(5, np.arange(4 * 900))
    rounds = LABELS[ids].reshape(-1, 4)
    np.testing.assert_array_equal(np.sort(rounds, 1), np.tile([0, 1, 2, 4], (900, 1)))
    assert sampler.epoch == 4 * 30
    for c, count in enumerate(COUNTS):
        own = ids[LABELS[ids] == c]
        for first in range(0, len(own) - count + 1, count or len(own) + 1):
            np.testing.assert_array_equal(np.sort(own[first : first + count]), np.flatnonzero(c == LABELS))
    firsts = np.bincount(rounds[:, 0], minlength=5)[[0, 1, 2, 4]]
    assert stats.chisquare(firsts).pvalue > 1e-3  # any class may come first in a round


@pytest.mark.parametrize("text", ["balanced", f"{__name__}:make_own(of_class=1)"])
def test_batches_are_the_same_on_any_placement_and_process(files, text):
    images = stream.Images(source(), "decode(1)", 3, sampler=build(text, files))
    spec = stream.StreamSpec(3, 16, num_seeds=2, needs_ids=True)
    whole = dict(stream.batches(images, spec, range(2, 8)))
    at = np.arange(4 * 16, 5 * 16)
    for seed in (3, 4):
        ids = images.sampler.ids(seed, at)
        np.testing.assert_array_equal(whole[4]["id"][seed - 3 :: 2], ids)
        np.testing.assert_array_equal(whole[4]["image"][seed - 3 :: 2, 0, 0, 0], ids)
        np.testing.assert_array_equal(whole[4]["epoch"][seed - 3 :: 2], at // images.sampler.epoch)
    for step, batch in stream.batches(images, spec, range(4, 7), lambda size: np.arange(1, size, 2)):
        np.testing.assert_array_equal(batch["id"].reshape(-1, 2), whole[step]["id"].reshape(-1, 2)[1::2])
    for step, batch in placement.batches("device", images, spec, range(2, 8), sharding.make_mesh()):
        jax.tree.map(np.testing.assert_array_equal, batch, whole[step])


@pytest.mark.parametrize(("n", "size"), [(1437, 500), (999, 1000), (3, 1)])
def test_the_sampling_of_the_page_visits_every_example_of_each_window(n, size):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n# my_sampling\.py\n(.*?)```", page, re.DOTALL)[1], names)
    window = np.arange(n) // size
    for seed in range(40):
        ids = names["windows"](np.uint64(seed), n + np.arange(n), n, size=size)
        np.testing.assert_array_equal(ids[np.lexsort((ids, window))], np.arange(n))  # sorted in each window


@pytest.mark.parametrize(("text", "numbers", "message"), [
    ("weighted('age')", None, "data.source has no column 'age' among ['text']; name one, or a file of numbers"),
    ("weighted('text')", None, "the column 'text' does not hold numbers: could not convert string"),
    ("weighted('F')", WEIGHTS[:-1], "holds float64[59]; expected a real number for each of the 60 examples of the"),
    ("weighted('F')", np.append(WEIGHTS[1:], np.nan), "each must be 0 or more, and the sum finite and above 0"),
    ("weighted('F')", np.append(WEIGHTS[1:], -1), "are from -1.0 to 1.0, with the sum "),
    ("weighted('F')", np.array([{}], object), "as a .npy file"),
    ("subset('F')", np.array([3, 60]), "has ids from 3 to 60, but the split has 0 to 59"),
    ("subset('F')", np.array([3, -1]), "has ids from -1 to 3, but the split has 0 to 59"),
    ("subset('F')", np.array([3, 4, 3]), "has an id more than once; use weighted"),
    ("subset('F')", np.array([1.0]), "holds float64[1]; expected whole numbers [m]"),
    (f"{__name__}:wrong(returns='halves')", None, "returns float64[4155] for 4155 positions; return a whole number"),
    (f"{__name__}:wrong(returns='positions')", None, "returns the id 61, but the split has 0 to 59"),
    (f"{__name__}:wrong(returns='rows')", None, "an id must depend only on the key and its position"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(tmp_path, text, numbers, message):
    if numbers is not None:
        np.save(tmp_path / "numbers.npy", numbers)
    text = text.replace("'F'", repr(str(tmp_path / "numbers.npy")))
    with pytest.raises(UserError) as e:
        sampling.build(text, dataclasses.replace(source(), columns={"text": ["x"] * N}), "data.extra.more")
    assert message in str(e.value)


def from_file(source, path):
    order = np.load(path)
    return lambda key, positions, n: order[positions % len(order)]


def test_a_sampler_that_reads_a_file_is_recorded(tmp_path):
    """By the ids that it returns: also in a part of the file that only later epochs read."""
    digests = []
    for changed in (0, 0, 7, 250):
        order = np.arange(300) % N
        order[changed : changed + 2] += changed > 0
        np.save(tmp_path / "order.npy", order % N)
        own = f"{__name__}:from_file({str(tmp_path / 'order.npy')!r})"
        digests.append(stream.Images(source(), "decode(1)", sampler=build(own)).describe().sampling)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def wrong(key, positions, n, returns):
    return {"halves": positions / 2, "positions": positions, "rows": np.arange(len(positions)) % n}[returns]


def test_weights_of_an_array_file(tmp_path):
    """A run records their digest, so it refuses to resume with others."""
    prints = []
    for weights in ({}, {"train_weights": WEIGHTS}, {"train_weights": WEIGHTS[::-1]}):
        np.savez(tmp_path / "data.npz", x_train=X, y_train=LABELS, **weights)
        base = sources.open_splits(f"arrays({str(tmp_path / 'data.npz')!r})")
        sampler = sampling.build("weighted", base["train"]) if weights else None
        info = stream.Images(base["train"], "decode(1)", sampler=sampler).describe()
        prints.append((info.fingerprint, info.sampling))
    assert [len(set(each)) for each in zip(*prints, strict=True)] == [3, 3]
    split = sources.take_split(base, "train[10:30]+train[:5]")
    np.testing.assert_array_equal(split.columns["weight"], np.r_[WEIGHTS[::-1][10:30], WEIGHTS[::-1][:5]])


SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 2000)


@given(SEEDS, SIZES)
def test_every_epoch_is_an_exact_permutation(seed, n):
    ids = sampling.position_ids(seed, np.arange(2 * n), n).reshape(2, n)
    np.testing.assert_array_equal(np.sort(ids), np.tile(np.arange(n), (2, 1)))


def test_mix_is_the_published_splitmix64():
    """The first outputs of SplitMix64 from state 1234567, by its authors' reference code."""
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert sampling._mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def reference_id(seed, position, n):
    """The definition in Python integers: six Feistel rounds over [0, a)², repeated until the result is below n."""

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    epoch, x = divmod(position, n)
    key = mix((seed * 2**32 + zlib.crc32(b"order") + mix(epoch)) % 2**64)
    a = max(16, math.isqrt(n - 1) + 1)
    while True:
        left, right = divmod(x, a)
        for r in range(6):
            left, right = right, (left + mix((right + mix((key + r) % 2**64)) % 2**64)) % a
        x = left * a + right
        if x < n:
            return x


@given(SEEDS, st.one_of(SIZES, st.integers(1, 2**40)), st.integers(0, 2**50))
def test_ids_are_those_of_the_definition(seed, n, position):
    positions = np.arange(position, position + 3)
    expected = [reference_id(seed, p, n) for p in positions.tolist()]
    assert sampling.position_ids(seed, positions, n).tolist() == expected
