"""Pickles built to fill the memory or run forever are refused right away; plain data are read correctly."""

import collections
import io
import pickle
import struct
import tracemalloc

import pytest
import torch_format
from cases import thorough
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
    """They are calls with a list of pairs."""
    content = b"\x80\2" + call("collections.OrderedDict", b"](](U\1aK\1e](U\1bK\2ee\x85") + b"."
    assert load(content) == collections.OrderedDict(a=1, b=2)


def call(name, arguments):
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + arguments + b"R"


TUPLES = b")" + b"q\0" + b"h\0\x86q\0" * 60  # a tuple of a tuple twice, 60 deep: 2**60 leaves in 240 bytes
MANY = b"](" + b"N" * 200_000 + b"e" + b"q\1"  # a list of 200,000 at place 1 of the memo
PAIRS = b"](" + b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(50_000)) + b"eq\1"
ROW = b"(" + b"N" * 200_000 + b"tq\1"  # a tuple of 200,000
STORAGE = b"(" + torch_format.text("storage") + b"ctorch\nFloatStorage\n" + torch_format.text("0") + b"NNtQq\2"
BOMBS = {
    "a memo of 2**31 places": (b"Nr\xff\xff\xff\x7f.", None),
    "a number of 2**31 bytes": (b"\x8b\xff\xff\xff\x7f1.", "EOFError"),
    "a text of 2**62 bytes": (b"\x8d" + struct.pack("<Q", 2**62) + b"x.", "EOFError"),
    "an array of 2**40 bytes": (b"\x96" + struct.pack("<Q", 2**40) + b"x.", "KeyError"),
    "a frame of 2**62 bytes": (b"\x80\4\x95" + struct.pack("<Q", 2**62) + b"N", "EOFError"),
    "a key of 2**60 leaves": (b"}" + TUPLES + b"Ns.", "neither a text"),
    "a dict of 2**60 leaves": (b"(" + TUPLES + b"Nd.", "KeyError"),
    "a set of 2**60 leaves": (b"\x8f(" + TUPLES + b"\x90.", "KeyError"),
    "a call for a set": (b"]" + TUPLES + b"aq\1" + call("builtins.set", b"h\1\x85"), "asks for builtins.set"),
    "a call for a dict of 2**60 leaves": (
        b"]]" + TUPLES + b"aNaaq\1" + call("collections.OrderedDict", b"h\1\x85") + b".", "neither a text"
    ),
    "a storage's name of 2**60 leaves": (b"(" + torch_format.text("storage") + TUPLES + b"h\0NNtQ.", "malformed"),
    "keys with one hash": (b"}\x8a\x08" + struct.pack("<q", 2**61 - 1) + b"Ns.", "neither a text"),
    "tuples of lists": (MANY + call("torch.Size", b"h\1\x85") * 20_000 + b".", "again and again"),
    "dicts of dicts": (PAIRS + call("collections.OrderedDict", b"h\1\x85") * 20_000 + b".", "again and again"),
    "attributes of many dicts": (PAIRS + (call("collections.OrderedDict", b")") + b"h\1b") * 1000 + b".", None),
    "a tensor of many axes": (
        STORAGE + ROW + call("torch._utils._rebuild_tensor", b"(h\2K\0h\1h\1t") + b".", "Error"
    ),
    "a tensor of great sizes": (
        STORAGE + call("torch._utils._rebuild_tensor", b"(h\2K\0" + torch_format.integers([2**60]) * 2 + b"t"),
        "valid shape",
    ),
    "lists 100,000 deep": (b"]" * 100_000 + b"a" * 99_999 + b".", None),
    "an object": (b"ccollections\nOrderedDict\n)\x81.", "KeyError"),
    "an extension": (b"\x82\1.", "KeyError"),
    "an attribute of a function": (b"ctorch\nSize\n}X\1\0\0\0aK\1sb.", "something else than a dict"),
}  # fmt: skip
LONG = "attributes of many dicts", "a tensor of many axes", "lists 100,000 deep"


@pytest.mark.parametrize("name", [*(name for name in BOMBS if name not in LONG), *thorough(*LONG)])
def test_a_pickle_takes_neither_memory_nor_time(name):
    content, fragment = BOMBS[name]
    tracemalloc.start()
    try:
        if fragment is None:
            load(content)
        else:
            with pytest.raises(Exception) as e:  # files.read gives one sentence for all of them
                load(content)
            assert fragment in f"{type(e.value).__name__}: {e.value}"
            assert len(str(e.value)) < 200
        assert tracemalloc.get_traced_memory()[1] < 200 * len(content) + 1_000_000
    finally:
        tracemalloc.stop()
