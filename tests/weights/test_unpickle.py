"""Pickles built to fill the memory or run forever are refused right away; plain data are read correctly."""

import argparse
import collections
import contextlib
import datetime
import io
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch_format
from hypothesis import given
from hypothesis import strategies as st

from imgclf_jax.weights import unpickle

KEYS = st.one_of(st.text(max_size=4), st.integers(-(2**59), 2**59))
LEAVES = st.one_of(KEYS, st.booleans(), st.none(), st.floats(), st.binary(max_size=4), st.integers(), st.just(()))
PLAIN = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


def load(content):
    return unpickle.load(io.BytesIO(content))[0]


@given(PLAIN, st.sampled_from([3, 4, 5]))  # earlier ones write bytes as calls
def test_plain_data_come_out_as_python_reads_them(value, protocol):
    """An object referenced twice is one object."""
    content = pickle.dumps([value, value], protocol)
    got, again = load(content)
    assert got == value
    assert type(got) is type(value)
    if isinstance(value, (list, dict)):
        assert got is again


def test_the_ordered_dicts_of_python_2():
    content = b"\x80\2" + call("collections.OrderedDict", b"](](U\1aK\1e](U\1bK\2ee\x85") + b"."
    assert load(content) == collections.OrderedDict(a=1, b=2)


def test_what_training_scripts_save_beside_weights():
    """It is dropped without being made."""
    beside = [argparse.Namespace(lr=0.1, out=Path("x")), np.float64(0.5), np.arange(3.0), {1}, datetime.datetime.now()]
    content = {"beside": beside, "log": collections.defaultdict(list, a=[1, 2])}
    assert load(pickle.dumps(content, 2)) == {"beside": [None] * 5, "log": {"a": [1, 2]}}


def call(name, arguments):
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + arguments + b"R"


TUPLES = b")" + b"q\0" + b"h\0\x86q\0" * 60  # a tuple of a tuple twice, 60 deep: 2**60 leaves in 240 bytes
MANY = b"](" + b"N" * 200_000 + b"e" + b"q\1"  # a list of 200,000 at place 1 of the memo
PAIRS = b"](" + b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(50_000)) + b"eq\1"
BOMBS = {
    "a memo of 2**31 places": (b"Nr\xff\xff\xff\x7f.", None),
    "a text of 2**62 bytes": (b"\x8d" + struct.pack("<Q", 2**62) + b"x.", ".*"),
    "a frame of 2**62 bytes": (b"\x80\4\x95" + struct.pack("<Q", 2**62) + b"N", ".*"),
    "a key of 2**60 leaves": (b"}" + TUPLES + b"Ns.", "neither a text"),
    "a set of 2**60 leaves": (b"\x8f(" + TUPLES + b"\x90.", "143"),
    "a call for a dict of 2**60 leaves": (
        b"]]" + TUPLES + b"aNaaq\1" + call("collections.OrderedDict", b"h\1\x85") + b".", "neither a text"
    ),
    "a storage's name of 2**60 leaves": (b"(" + torch_format.text("storage") + TUPLES + b"h\0NNtQ.", "malformed"),
    "keys with one hash": (b"}\x8a\x08" + struct.pack("<q", 2**61 - 1) + b"Ns.", "neither a text"),
    "tuples of lists": (MANY + call("torch.Size", b"h\1\x85") * 20_000 + b".", "again and again"),
    "dicts of dicts": (PAIRS + call("collections.OrderedDict", b"h\1\x85") * 20_000 + b".", "again and again"),
    "attributes of many dicts": (PAIRS + (call("collections.OrderedDict", b")") + b"h\1b") * 1000 + b".", None),
    "lists 100,000 deep": (b"]" * 100_000 + b"a" * 99_999 + b".", None),
    "an object": (b"ccollections\nOrderedDict\n)\x81.", None),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_takes_neither_memory_nor_time(name):
    content, fragment = BOMBS[name]
    tracemalloc.start()
    try:
        # files.read gives one sentence for all of them; an opcode that is not plain data is a KeyError
        with pytest.raises(Exception, match=fragment) if fragment else contextlib.nullcontext():
            load(content)
        assert tracemalloc.get_traced_memory()[1] < 200 * len(content) + 1_000_000
    finally:
        tracemalloc.stop()
