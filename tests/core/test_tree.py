"""Digests of parameter trees, and the keys and generators behind every random draw."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgclf_jax.core import rng, tree


def test_named_leaves_are_sorted_by_path():
    """As text, whatever the order of flattening: "a-b" stands before "a/b"."""
    named = tree.named_leaves({"a": {"b": 0}, "a-b": 0, "B": [0, 0]})
    assert [path for path, _ in named] == ["B/0", "B/1", "a-b", "a/b"]


def test_sha256_is_of_values_and_not_of_their_layout():
    """On the host or a device, and in any order in memory; its format is in tests/run/test_digests.py."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert len({tree.sha256({"w": one}) for one in (x, jnp.asarray(x), np.array(x, order="F"))}) == 1


def bits_of(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_key_is_the_documented_fold_and_the_same_under_jit(seed):
    folded = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"augment")), 7)
    assert bits_of(rng.key(seed, "augment", 7)) == bits_of(folded)
    assert bits_of(rng.key(np.uint32(seed), "augment", np.int32(7))) == bits_of(folded)
    traced = jax.jit(lambda seed, step: rng.key(seed, "augment", step))
    assert bits_of(traced(np.uint32(seed), np.int32(7))) == bits_of(folded)


def test_generator_is_philox_with_the_documented_key():
    """NumPy's Philox, with seed and name in one word of the key and the position in the other."""
    for seed, position in ((0, 0), (5, 2**40), (2**31, 3), (2**32 - 1, 2**62 + 1)):
        key = np.array([seed * 2**32 + zlib.crc32(b"preprocess"), position], np.uint64)
        expected = np.random.Generator(np.random.Philox(key=key)).integers(2**63, size=8)
        np.testing.assert_array_equal(rng.generator(seed, "preprocess", position).integers(2**63, size=8), expected)
