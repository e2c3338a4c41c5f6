"""Text from others: whatever it contains, there is a result or one sentence, and never a traceback."""

import json

from fuzzing import answered
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imgclf_jax import config
from imgclf_jax.core import spec

WHOLE = json.loads(config.to_json(config.default_config()))
NAMES = st.one_of(st.text(max_size=4), st.sampled_from(
    ["data", "eval", "data.source", "seed", "get", "items", "keys", "lock", "is_locked", "_fields", "__class__", "$ref"]
))  # fmt: skip
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([2**63, -(2**64), 10**400, -0.0]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)


def paths(node, path=()):
    yield path
    if isinstance(node, dict):
        for key, value in node.items():
            yield from paths(value, (*path, key))


def changed(path, value):
    """The whole config with another value at a path, which may be new."""
    if not path:
        return value
    tree = json.loads(json.dumps(WHOLE))
    node = tree
    for key in path[:-1]:
        node = node[key]
    if isinstance(node, dict):
        node[path[-1]] = value
    return tree


def valid(text):
    found = config.from_json(text, "config.json")
    config.validate(found)
    return found


PLACES = st.one_of(st.sampled_from(list(paths(WHOLE))), st.tuples(NAMES), st.tuples(st.just("data"), NAMES))
DURATIONS = st.from_regex(r"\A[0-9.e]{1,12} ?[kM]? ?(epochs?|steps|examples|%)\Z")


@settings(max_examples=150)
@given(PLACES, st.one_of(JSON, DURATIONS), st.integers(0, 40))
@example(("total",), "1e999999999 epochs", 0)
@example(("log_every",), "9" * 5000 + " steps", 0)
def test_a_config_file_of_a_run(path, value, cut):
    text = json.dumps(changed(path, value))
    for some in (text, text[: len(text) - cut] + "}" * (cut % 3)):
        found = answered(valid, some, longest=10**5)
        assert found is None or config.from_json(config.to_json(found), "config.json") == found


GOOD = ["cnn", "vit('S', patch=16)", "pad_crop(4)|cutout(size=8, fill=-0.5)", "f({'|': (1, [2])}, x='a|b')",
        "a.b:C(d=None)"]  # fmt: skip
PIECES = st.sampled_from(
    ["(", ")", "[", "]", "{", "}", "|", ",", "=", ":", "'", '"', "\\", "#", "\n", "\0", "*", "**", "-", "~", ".", "e9",
     "9" * 5000, "0x", "1_0", "lambda:", "f''", "not ", "\x0c", "\ud800", "é", "(" * 300, "-" * 3000,
     "[1]" * 200, "x" * 10_000]
)  # fmt: skip


@settings(max_examples=150)
@given(
    st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3), PIECES), min_size=1, max_size=3)
)
def test_a_spec_with_something_put_into_it(text, changes):
    for place, dropped, piece in changes:
        text = text[:place] + piece + text[place + dropped :]
    calls = answered(spec.parse, text)
    assert calls is None or spec.parse("|".join(map(str, calls))) == calls
