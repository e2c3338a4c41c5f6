"""Digests of parameter trees, and the keys and generators behind every random draw."""

import hashlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgclf_jax.core import rng, tree

PARAMS = {
    "head": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5, "bias": np.zeros(3, np.float32)},
    "block0": {"scale": np.float32(1.5)},
    "steps": np.array([3, -1], np.int32),
}


def digest(*leaves):
    """SHA-256 of the documented format, with the text and bytes written by hand: path, dtype, shape, bytes."""
    whole = hashlib.sha256()
    for path, dtype, shape, data in leaves:
        whole.update(path.encode() + b"\0" + dtype.encode() + b"\0" + shape.encode() + b"\0" + data)
    return whole.hexdigest()


def test_named_leaves_are_sorted_by_path():
    """As text, whatever the order of flattening: "a-b" stands before "a/b"."""
    named = tree.named_leaves({"a": {"b": 0}, "a-b": 0, "B": [0, 0]})
    assert [path for path, _ in named] == ["B/0", "B/1", "a-b", "a/b"]


def test_sha256_is_that_of_the_documented_format():
    expected = digest(
        ("block0/scale", "<f4", "()", bytes.fromhex("0000c03f")),
        ("head/bias", "<f4", "(3,)", bytes(12)),
        ("head/kernel", "<f4", "(2, 3)", bytes.fromhex("000020c00000c0bf000000bf0000003f0000c03f00002040")),
        ("steps", "<i4", "(2,)", bytes.fromhex("03000000ffffffff")),
    )  # fmt: skip
    assert tree.sha256(PARAMS) == expected
    assert tree.sha256(jax.tree.map(jnp.asarray, PARAMS)) == expected  # arrays on the device too
    assert tree.sha256(jax.tree.map(lambda x: np.array(x, order="F"), PARAMS)) == expected  # and any memory layout


def test_types_that_numpy_does_not_have_are_told_apart_by_name():
    same_byte = [np.zeros(2, np.uint8).view(d) for d in (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8, jnp.uint8)]
    assert len({tree.sha256({"w": leaf}) for leaf in same_byte}) == 4
    assert tree.sha256({"w": jnp.ones(1, jnp.bfloat16)}) == digest(("w", "bfloat16", "(1,)", b"\x80\x3f"))


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
