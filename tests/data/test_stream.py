"""A batch is a pure function of (seed, step): a test of every promise that the stream makes."""

import math
import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from imgclf_jax.data import sampling

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
    """Another order would invalidate every published seed."""
    positions = np.arange(position, position + 3)
    expected = [reference_id(seed, p, n) for p in positions.tolist()]
    assert sampling.position_ids(seed, positions, n).tolist() == expected
