"""Digests of parameter trees, and the keys and generators that every random draw comes from."""

import hashlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgclf_jax.core import rng, tree

PARAMS = {
    "head": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5, "bias": np.zeros(3, np.float32)},
    "block0": {"scale": np.float32(1.5)},
    "steps": np.array([3, -1], np.int32),
}


def digest(*leaves):
    """SHA-256 from the documented format, on text and bytes written by hand: path, dtype, shape, bytes."""
    whole = hashlib.sha256()
    for path, dtype, shape, data in leaves:
        whole.update(path.encode() + b"\0" + dtype.encode() + b"\0" + shape.encode() + b"\0" + data)
    return whole.hexdigest()


# --- tree.sha256 ---


def test_named_leaves_are_sorted_by_path():
    assert [path for path, _ in tree.named_leaves(PARAMS)] == ["block0/scale", "head/bias", "head/kernel", "steps"]
    # Sorted as text, whatever the order of flattening: "a-b" stands before "a/b".
    assert [path for path, _ in tree.named_leaves({"a": {"b": 0}, "a-b": 0, "B": [0, 0]})] == [
        "B/0",
        "B/1",
        "a-b",
        "a/b",
    ]


def test_leaves_of_the_same_path_keep_their_order():
    """Arrays have no order, so that comparing them on a tie of paths would fail."""
    leaves = tree.named_leaves({"a": {"b": np.zeros(2)}, "a/b": np.ones(2)})
    assert [(path, float(leaf[0])) for path, leaf in leaves] == [("a/b", 0.0), ("a/b", 1.0)]


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


def test_every_flipped_bit_changes_the_digest():
    digests = {tree.sha256(PARAMS)}
    bits = 0
    for path, leaf in tree.named_leaves(PARAMS):
        for bit in range(leaf.nbytes * 8):
            data = bytearray(np.asarray(leaf).tobytes())
            data[bit // 8] ^= 1 << bit % 8
            changed = np.frombuffer(bytes(data), leaf.dtype).reshape(leaf.shape)
            named = {p: (changed if p == path else x) for p, x in tree.named_leaves(PARAMS)}
            digests.add(tree.sha256(named))
            bits += 1
    assert len(digests) == bits + 1


@pytest.mark.parametrize(
    "other",
    [
        {"b": np.zeros(4, np.float32)},  # path
        {"A": np.zeros(4, np.float32)},
        {"x": {"a": np.zeros(4, np.float32)}},
        {"a": np.zeros(4, np.int32)},  # dtype, with the same bytes
        {"a": np.zeros(4, np.uint32)},
        {"a": np.zeros(4, ">f4")},
        {"a": np.zeros(2, np.float64)},
        {"a": np.zeros((2, 2), np.float32)},  # shape
        {"a": np.zeros((4, 1), np.float32)},
        {"a": np.zeros(5, np.float32)},
        {"a": -np.zeros(4, np.float32)},  # equal values, other bits
        {"a": np.zeros(4, np.float32), "b": np.zeros(0, np.float32)},  # one leaf more, without bytes
        {},
    ],
)
def test_any_difference_changes_the_digest(other):
    one = {"a": np.zeros(4, np.float32)}
    assert tree.sha256(other) != tree.sha256(one)
    assert tree.sha256({"a": np.zeros(4, np.float32)}) == tree.sha256(one)


def test_swapped_leaves_change_the_digest():
    a, b = np.zeros(2, np.float32), np.ones(2, np.float32)
    assert tree.sha256({"a": a, "b": b}) != tree.sha256({"a": b, "b": a})


# --- rng ---


def bits_of(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_name_hash_is_crc32():
    assert rng.name_hash("123456789") == 0xCBF43926  # the check value of CRC-32/ISO-HDLC


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_key_is_the_documented_fold_and_the_same_under_jit(seed):
    folded = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"augment")), 7)
    assert bits_of(rng.key(seed, "augment", 7)) == bits_of(folded)
    assert bits_of(rng.key(np.uint32(seed), "augment", np.int32(7))) == bits_of(folded)
    traced = jax.jit(lambda seed, step: rng.key(seed, "augment", step))
    assert bits_of(traced(np.uint32(seed), np.int32(7))) == bits_of(folded)


def test_keys_differ_by_seed_name_and_step():
    triples = [(s, n, t) for s in (0, 1, 2**32 - 1) for n in ("init", "augment", "dropout") for t in (0, 1, 10**7)]
    assert len({bits_of(rng.key(*triple)) for triple in triples}) == len(triples)


def test_one_compilation_serves_every_seed_and_step():
    traced = jax.jit(lambda seed, step: jax.random.key_data(rng.key(seed, "augment", step)))
    for seed, step in ((0, 0), (2**32 - 1, 5), (3, 2**31 - 1)):
        traced(np.uint32(seed), np.int32(step))
    assert traced._cache_size() == 1


def test_generator_is_philox_with_the_documented_key():
    """NumPy's own Philox, keyed by seed and name in one word and the position in the other."""
    for seed, position in ((0, 0), (5, 2**40), (2**31, 3), (2**32 - 1, 2**62 + 1)):
        key = np.array([seed * 2**32 + zlib.crc32(b"preprocess"), position], np.uint64)
        expected = np.random.Generator(np.random.Philox(key=key)).integers(2**63, size=8)
        np.testing.assert_array_equal(rng.generator(seed, "preprocess", position).integers(2**63, size=8), expected)


def philox4x64(key, counter):
    """Ten rounds of Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    mask, (k0, k1), (c0, c1, c2, c3) = 2**64 - 1, key, counter
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = b >> 64 ^ c1 ^ k0, b & mask, a >> 64 ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("seed", "position"), [(1, 2), (2**32 - 1, 10**9 + 7)])
def test_generator_gives_the_numbers_of_the_published_algorithm(seed, position):
    """A change here would change every random crop of every run already made. NumPy counts from one."""
    key = (seed * 2**32 + zlib.crc32(b"preprocess"), position)
    expected = philox4x64(key, (1, 0, 0, 0)) + philox4x64(key, (2, 0, 0, 0))
    assert rng.generator(seed, "preprocess", position).bit_generator.random_raw(8).tolist() == expected


SEEDS, POSITIONS = st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1)


@given(SEEDS, POSITIONS, st.integers(0, 31), st.integers(0, 62))
def test_generators_differ_where_any_bit_of_seed_or_position_does(seed, position, seed_bit, position_bit):
    def first(*args):
        return rng.generator(*args).bit_generator.random_raw(2).tolist()

    here = first(seed, "preprocess", position)
    assert first(seed, "preprocess", position) == here
    assert first(seed ^ 1 << seed_bit, "preprocess", position) != here
    assert first(seed, "preprocess", position ^ 1 << position_bit) != here
    assert first(seed, "preprocess2", position) != here
