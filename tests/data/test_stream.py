"""A batch is a pure function of (seed, step): every promise that the stream makes, proven."""

import math
import time
import tracemalloc
import zlib
from concurrent.futures import Future

import numpy as np
import pytest
import tensorflow
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import read_ahead, sources, stream

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 2000)
BATCHES = st.integers(1, 700)
RANDOM_OPS = "decode(1)|random_resized_crop(6, 5)"


def ids_of_steps(seed, start, stop, batch_size, n):
    return np.concatenate([stream.example_ids(seed, step, batch_size, n) for step in range(start, stop)])


# --- the order ---


@given(SEEDS, SIZES, BATCHES)
def test_every_epoch_is_an_exact_permutation(seed, n, batch_size):
    ids = ids_of_steps(seed, 0, -(-2 * n // batch_size), batch_size, n)
    for epoch in (ids[:n], ids[n : 2 * n]):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))


@pytest.mark.parametrize("n", [255, 256, 257, 2**16, 65_537, 100_003])
def test_sizes_around_the_edges_of_the_cipher_are_permuted_exactly(n):
    for seed in (0, 2**32 - 1):
        np.testing.assert_array_equal(np.sort(stream.example_ids(seed, 3, n, n)), np.arange(n))


@pytest.mark.parametrize("n", [17**2, 300, 1000**2])
def test_permutation_is_exact_for_any_round_function(n, monkeypatch):
    """Round values just below 2**64, where a sum in 64 bits would wrap and two elements could meet."""
    monkeypatch.setattr(stream, "_mix", lambda x: np.uint64(2**64 - 1) - x % np.uint64(5))
    out = stream.permute(np.arange(n, dtype=np.int64), n, np.zeros(1, np.uint64))
    np.testing.assert_array_equal(np.sort(out), np.arange(n))


@given(SEEDS, SIZES, BATCHES, BATCHES, st.integers(0, 10**9))
def test_batch_size_changes_only_the_grouping(seed, n, a, b, position):
    """The flat sequence of ids is one, wherever it is cut."""
    in_steps_of_a, in_steps_of_b = position // a, position // b
    one = stream.example_ids(seed, in_steps_of_a, a, n)[position - in_steps_of_a * a]
    other = stream.example_ids(seed, in_steps_of_b, b, n)[position - in_steps_of_b * b]
    assert one == other == stream.position_ids(seed, np.array([position]), n)[0]


@given(SEEDS, st.integers(0, 31), st.integers(0, 10**6))
def test_seeds_and_epochs_give_different_orders(seed, bit, epoch):
    """Of 1,000 elements two random orders agree in about one place; in 12 or more with probability 1e-9."""
    n = 1000
    here = stream.example_ids(seed, epoch, n, n)
    for other in (stream.example_ids(seed ^ 1 << bit, epoch, n, n), stream.example_ids(seed, epoch + 1, n, n)):
        assert np.sum(here == other) < 12


def p_value(counts):
    return stats.chisquare(counts.ravel()).pvalue


def test_every_element_is_equally_likely_in_every_place_over_seeds():
    n, seeds, groups = 200, 2000, 10
    ids = np.array([stream.example_ids(seed, 0, n, n) for seed in range(seeds)])  # [seeds, place]
    assert all(p_value(np.bincount(ids[:, place], minlength=n)) > 1e-4 for place in (0, 1, 57, 199))
    places = np.argsort(ids)  # [seeds, id]
    assert all(p_value(np.bincount(places[:, i], minlength=n)) > 1e-4 for i in (0, 1, 57, 199))
    group = ids * groups // n
    for a, b in ((0, 1), (57, 58), (0, 199)):  # and for two places, any pair of tenths of the set
        assert p_value(np.bincount(group[:, a] * groups + group[:, b], minlength=groups**2)) > 1e-4


def test_every_order_is_equally_likely_over_epochs():
    n, epochs = 4, 60_000
    ids = stream.position_ids(3, np.arange(n * epochs), n).reshape(epochs, n)
    code = ids @ 4 ** np.arange(n)
    orders, counts = np.unique(code, return_counts=True)
    assert len(orders) == 24
    assert p_value(counts) > 1e-4
    # And an order tells nothing of the next epoch's.
    index = np.searchsorted(orders, code)
    assert p_value(np.bincount(index[:-1] * 24 + index[1:], minlength=576)) > 1e-4


def test_neighbours_in_a_large_set_are_spread_evenly():
    """Steps between consecutive ids, modulo n, are uniform: consecutive places show no pattern."""
    n = 100_003
    ids = stream.example_ids(11, 0, n, n)
    for lag in (1, 2, 317):  # 317 is the side of the cipher's square
        steps = (ids[lag:] - ids[:-lag]) % n
        assert p_value(np.bincount(steps * 64 // n, minlength=64)) > 1e-4


def test_mix_is_the_published_splitmix64():
    """The first numbers of SplitMix64 from state 1234567, as its authors' reference code gives them."""
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert stream._mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def reference_id(seed, position, n):
    """The definition over again, on Python's integers: six Feistel rounds over [0, a)², walked until below n."""

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
    assert stream.position_ids(seed, positions, n).tolist() == expected


def test_known_answers():
    """Our own output, written down once: a changed definition of the order would break every seed ever published."""
    assert stream.example_ids(0, 0, 8, 60_000).tolist() == [12477, 24869, 22246, 19276, 48411, 59251, 12473, 15838]
    assert stream.example_ids(2**32 - 1, 10_000_000, 8, 1_281_167).tolist() == [
        375582, 673254, 456209, 1019959, 6194, 523737, 200136, 1186612]  # fmt: skip
    assert stream.example_ids(1, 1, 5, 3).tolist() == [0, 1, 2, 0, 0]


# --- any step at the same cost ---


def test_step_ten_million_of_a_trillion_examples_allocates_next_to_nothing():
    """Nothing of the size of the set, 2**40, or of the number of steps before is made: there would be no room."""
    stream.example_ids(0, 0, 128, 2**40)
    peaks = []
    for step in (0, 10_000_000):
        tracemalloc.start()
        ids = stream.example_ids(5, step, 128, 2**40)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(set(ids.tolist())) == 128
        assert ids.max() > 2**38  # from all of the set
    assert max(peaks) < 64 * 1024


def test_streaming_from_step_ten_million_reads_those_examples_alone():
    source = Recorder(fake(2**40, (2, 2, 1)))
    images = stream.Images(source, "decode(1)")
    source.ids.clear()
    batches = list(stream.train_batches(images, 7, 16, 10**7, 10**7 + 3))
    expected = ids_of_steps(7, 10**7, 10**7 + 3, 16, 2**40)
    assert sorted(source.ids) == sorted(expected.tolist())
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), expected % 5)


# --- batches ---


class Recorder:
    """A source that notes which ids it was asked for, and dawdles so that threads overtake each other."""

    def __init__(self, source, dawdle=()):
        self.source, self.dawdle, self.ids, self.calls = source, list(dawdle), [], 0
        self.class_names = source.class_names

    def __len__(self):
        return len(self.source)

    def read(self, ids):
        self.calls += 1
        if self.dawdle:
            time.sleep(self.dawdle[self.calls % len(self.dawdle)])
        self.ids += ids.tolist()
        return self.source.read(ids)


def fake(n=40, shape=(9, 8, 1)):
    return sources.fake(n, shape, 5)["train"]


def assert_same(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype
            np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.parametrize("ops", ["decode(1)", RANDOM_OPS])
def test_a_batch_is_the_same_however_it_is_reached(ops, monkeypatch):
    """From step 0 or directly, with any prefetch and any number of threads, with and without TensorFlow."""
    whole = list(stream.train_batches(stream.Images(fake(), ops, seed=3), 3, 12, 0, 8))
    assert [b["image"].shape for b in whole] == [(12, 9, 8, 1) if ops == "decode(1)" else (12, 6, 5, 1)] * 8
    for start, threads, prefetch, dawdle in ((5, 1, 1, ()), (3, 7, 9, (0.02, 0, 0.005)), (7, 3, 2, (0, 0.01))):
        images = stream.Images(Recorder(fake(), dawdle), ops, 3, threads)
        assert_same(stream.train_batches(images, 3, 12, start, 8, prefetch=prefetch), whole[start:])
    # Where TensorFlow is not installed, and where its import ends when some batches have been read.
    importing: Future = Future()
    monkeypatch.setattr(read_ahead.tensorflow_import, "tensorflow", lambda: importing)
    batches = stream.train_batches(images, 3, 12, 2, 8)
    first = [next(batches) for _ in range(2)]
    importing.set_result(tensorflow)
    assert_same([*first, *batches], whole[2:])
    importing = Future()
    importing.set_result(None)
    assert_same(stream.train_batches(images, 3, 12, 2, 8), whole[2:])


def test_labels_and_pixels_belong_to_the_ids():
    source = fake()
    for step, batch in enumerate(stream.train_batches(stream.Images(source, "decode(1)"), 9, 16, 0, 5)):
        expected = source.read(stream.example_ids(9, step, 16, 40))
        np.testing.assert_array_equal(batch["image"], expected["image"])
        np.testing.assert_array_equal(batch["label"], expected["label"])


@pytest.mark.parametrize("hosts", [2, 3, 12])
def test_the_slices_of_all_hosts_make_the_global_batch(hosts):
    images = stream.Images(fake(), RANDOM_OPS, 4)
    slices = [list(stream.train_batches(images, 4, 12, 2, 5, host, hosts)) for host in range(hosts)]
    joined = [{k: np.concatenate([s[i][k] for s in slices]) for k in ("image", "label")} for i in range(3)]
    assert_same(joined, stream.train_batches(images, 4, 12, 2, 5))


def test_a_host_reads_its_slice_alone():
    source = Recorder(fake(2**40, (2, 2, 1)))
    images = stream.Images(source, "decode(1)")
    source.ids.clear()
    list(stream.train_batches(images, 1, 12, 0, 2, host=1, hosts=3))
    assert sorted(source.ids) == sorted(i for step in (0, 1) for i in stream.example_ids(1, step, 12, 2**40)[4:8])


def test_hosts_must_divide_the_batch():
    images = stream.Images(fake(), "decode(1)")
    with pytest.raises(UserError, match="batch_size=12 is not divisible by the 5 hosts"):
        next(stream.train_batches(images, 0, 12, 0, 1, 0, 5))


def test_random_ops_draw_anew_in_every_epoch_and_for_every_seed():
    one = sources.ArraySource(fake(1, (9, 8, 1)).read(np.zeros(1, np.int64))["image"], np.zeros(1, np.int32), ("a",))
    crops = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):  # of one image, so that each batch is an epoch
        images = stream.Images(one, RANDOM_OPS, seed)
        crops.add(next(stream.train_batches(images, seed, 1, epoch, epoch + 1))["image"].tobytes())
    assert len(crops) == 3


def test_the_decoded_cache_changes_nothing_but_the_number_of_decodings(monkeypatch):
    source = Recorder(fake())
    cached = stream.Images(source, "decode(1)|resize(6)")
    batches = list(stream.train_batches(cached, 2, 16, 0, 10))
    assert set(source.ids) == set(range(40))
    source.ids.clear()
    assert_same(stream.train_batches(cached, 2, 16, 0, 10), batches)
    assert source.ids == []
    monkeypatch.setattr(stream, "_CACHE_BYTES", 40 * 6 * 6 - 1)
    assert_same(stream.train_batches(stream.Images(source, "decode(1)|resize(6)"), 2, 16, 0, 10), batches)
    assert len(source.ids) == 1 + 160


# --- evaluation ---


@pytest.mark.parametrize(
    ("n", "batch_size", "hosts"), [(10, 4, 1), (10, 4, 2), (8, 4, 4), (3, 8, 2), (7, 6, 3), (1, 1, 1)]
)
def test_evaluation_sees_every_example_once(n, batch_size, hosts):
    x = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    images = stream.Images(sources.ArraySource(x, np.arange(n, dtype=np.int32) * 3, ("a",) * 30), "decode(1)")
    slices = [list(stream.eval_batches(images, batch_size, host, hosts)) for host in range(hosts)]
    steps = -(-n // batch_size)
    assert [len(s) for s in slices] == [steps] * hosts
    for s in slices:
        for batch in s:
            assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
                "image": ((batch_size // hosts, 1, 1, 1), np.uint8),
                "label": ((batch_size // hosts,), np.int32),
                "mask": ((batch_size // hosts,), np.bool_),
            }
    joined = {k: np.concatenate([s[i][k] for i in range(steps) for s in slices]) for k in ("image", "label", "mask")}
    np.testing.assert_array_equal(joined["mask"], np.arange(steps * batch_size) < n)  # the padding stands last
    np.testing.assert_array_equal(joined["image"][joined["mask"]].ravel(), np.arange(n))
    np.testing.assert_array_equal(joined["label"][joined["mask"]], np.arange(n) * 3)


def to_float(image):
    return image.astype(np.float32) / 255


def test_a_users_host_op_that_does_not_give_uint8_is_refused():
    """Kept as uint8, values in [0, 1] would all become 0."""
    with pytest.raises(UserError, match=r"gives float32\[9, 8, 1\]; host ops give uint8"):
        stream.Images(fake(), f"decode(1)|{__name__}:to_float")
