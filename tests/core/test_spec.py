"""Specs round-trip and read literals alone; every mistake is answered with a UserError."""

import concurrent.futures
import keyword
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgclf_jax.core import paths, spec
from imgclf_jax.core.errors import Untrusted, UserError

IDENTIFIERS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(lambda s: not keyword.iskeyword(s))
NAMES = st.one_of(
    IDENTIFIERS,
    st.lists(IDENTIFIERS, min_size=2, max_size=3).map(".".join),
    st.tuples(st.lists(IDENTIFIERS, min_size=1, max_size=3).map(".".join), IDENTIFIERS).map(":".join),
)
TRICKY = st.text(alphabet="|()[]{}'\"\\\n\r\t,=#: abé\u2028\x0c\x85", max_size=12)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    TRICKY,
    st.text(st.characters(), max_size=8),  # lone surrogates too: repr escapes them
    st.binary(max_size=6),
)
KEYS = st.one_of(st.integers(), TRICKY, st.booleans(), st.tuples(st.integers(), TRICKY))
LITERALS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=6,
)
CALLS = st.builds(
    spec.Call, NAMES, st.lists(LITERALS, max_size=3).map(tuple), st.dictionaries(IDENTIFIERS, LITERALS, max_size=3)
)


@given(CALLS)
def test_text_of_a_call_parses_to_an_equal_call(call):
    again = spec.parse_one(str(call))
    assert again == call
    assert repr(again) == repr(call)  # and of the same types: 1, 1.0 and True are equal


@pytest.mark.parametrize(("text", "calls"), [
    ("", []),
    ("  \n", []),
    ("cnn()", [spec.Call("cnn")]),
    ("pad_crop( 4 ) | cutout(size=8,fill = -0.5)", [
        spec.Call("pad_crop", (4,)), spec.Call("cutout", (), {"size": 8, "fill": -0.5})]),
    ("f('a|b', \"c)|(\")|g({'|': (1, [2])})", [
        spec.Call("f", ("a|b", "c)|(")), spec.Call("g", ({"|": (1, [2])},))]),
    ("f('''a\n|b''')|g", [spec.Call("f", ("a\n|b",)), spec.Call("g")]),
    ("f('a' 'b', 1_000, 1e-3,)", [spec.Call("f", ("ab", 1000, 1e-3))]),
    ("f(1, # why | because\n 2)", [spec.Call("f", (1, 2))]),
    ("f({'b', 'a'})", [spec.Call("f", ({"a", "b"},))]),
    ("my.pkg:Net(width=3)", [spec.Call("my.pkg:Net", (), {"width": 3})]),
])  # fmt: skip
def test_examples(text, calls):
    assert spec.parse(text) == calls


@pytest.mark.parametrize(
    "text",
    [
        "f(", "f)", "f('a", "f]", "|f", "f|", "f||g", "f g", "3", "f;g", "f(1)(2)", "f(1).g", "f(1)+g(2)", "f[1]",
        "f(x)", "f(g(1))", "f(1+1)", "f(a.b)", "f(*[1])", "f(**{'a': 1})", "f(a=1, a=2)", "f(a=1, 2)", "f(lambda: 0)",
        "f([i for i in ()])", "f(x for x in ())", "f(a:=1)", "f(f'{1}')", "f(...)", "f(1 if 1 else 2)", "f(not 1)",
        "f(1e999)", "f(-1e999)", "f([1e999])", "f({[]: 1})", "f(0777)", "f($)", "f(\\)", "\\", "a:b:c", ":b", "a:",
        "f#x", "f('\0')", "f(\x00)", "f('\ud800')", "\ufefff", "]\r\n\n =|\r\n\x00g", "\r\n\ré}",
        f"f({'9' * 5000})", f"f(0x{'f' * 5000})", f"f({'-' * 5000}1)", f"f({'(' * 500})", f"f({'+'.join('1' * 3000)})",
    ],
    ids=lambda text: repr(text[:24]),
)  # fmt: skip
def test_garbage_is_a_user_error_that_shows_the_text(text):
    with pytest.raises(UserError) as e:
        spec.parse(text)
    assert repr(text)[:200] in str(e.value)
    assert len(str(e.value)) < 1000


def test_nothing_is_evaluated(tmp_path):
    file = tmp_path / "ran"
    for text in (
        f"f(open({str(file)!r}, 'w'))",
        f"f(x=[open({str(file)!r}, 'w') for _ in (1,)])",
        f"f(__import__('pathlib').Path({str(file)!r}).touch())",
        f"f(f'{{open({str(file)!r}, chr(119))}}')",
    ):
        with pytest.raises(UserError, match="literal"):
            spec.parse(text)
    assert not file.exists()


# --- looking up and binding ---


def scale(image, factor, offset=0):
    return image * factor + offset


def jitter(key, images, amount=1.0, *, mode="add"):
    return key, images, amount, mode


TABLE = {"scale": scale, "jitter": jitter}


def bind(text, leading=("key", "images", "image")):
    return spec.bind(spec.parse_one(text), TABLE, "op", leading=leading)


@pytest.mark.parametrize(("text", "expected"), [
    ("scale", "missing a required argument: 'factor'"),
    ("scale(1, 2, 3)", "too many positional arguments"),
    ("scale(1, factor=2)", "multiple values"),
    ("scale(1, ofset=2)", "unknown argument 'ofset': did you mean 'offset'"),
    ("scale(1, image=2)", "unknown argument 'image'"),
    ("jitter(1.0, 'mul')", "too many positional arguments"),
    ("scal(2)", "unknown op 'scal': did you mean 'scale'? allowed: jitter, scale, or an import path"),
    ("builtins:type(1)", "no readable signature"),
])  # fmt: skip
def test_bind_errors_name_the_argument_and_what_is_allowed(text, expected):
    given = ("key", "images") if text.startswith("jitter") else ("image",)
    with pytest.raises(UserError) as e:
        bind(text, given)
    assert expected in str(e.value)


def test_an_import_path_is_looked_up_without_registration(tmp_path, monkeypatch):
    (tmp_path / "my_own_ops_7").mkdir()
    (tmp_path / "my_own_ops_7" / "light.py").write_text(
        "LEVEL = 3\ndef brighten(image, by=1):\n    return image + by\n\nclass Net:\n    def __init__(self, width):\n"
        "        self.width = width\n"
    )
    (tmp_path / "my_own_ops_7" / "torn.py").write_text("\nclass Net(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert bind("my_own_ops_7.light:brighten(by=5)", leading=("image",))(1) == 6
    assert spec.bind(spec.parse_one("my_own_ops_7.light:Net(width=3)"), {}, "model")().width == 3
    for text, expected in {
        "my_own_ops_7.light:brigten": "unknown op 'my_own_ops_7.light:brigten': did you mean 'my_own_ops_7.light:bri",
        "my_own_ops_7.light:LEVEL": "unknown op 'my_own_ops_7.light:LEVEL'",  # not callable
        "my_own_ops_8:f": "cannot import 'my_own_ops_8' for op",
        "models/my_nets_7.py:Net": "module's name without folder and .py",
        "my_own_ops_7.torn:f": r"cannot import 'my_own_ops_7.torn' for op .*: invalid syntax \(torn.py, line 2\)",
    }.items():
        with pytest.raises(UserError, match=expected):
            bind(text)
    for name in [n for n in sys.modules if n.startswith("my_own_ops_7")]:
        del sys.modules[name]


@pytest.mark.parametrize(("text", "names"), [
    ("my_nets:Net", True),
    ("flip_lr|my_ops:noise", True),
    ("resnet(block='my_nets:Block(ratio=2)')", True),
    ("resnet(block='bottleneck(norm=\\'my_nets:Norm\\')')", True),
    ("folder('gs://bucket/photos')", False),
    ("resnet(block='basic_block(')", False),
])  # fmt: skip
def test_whether_a_spec_names_code(text, names):
    assert spec.names_code(text) == names


def test_untrusted_specs_are_refused_in_every_thread():
    """As long as one of two loads that overlap lasts, since worker threads build specs too."""

    def refused() -> str:
        try:
            spec.check_trusted("code")
        except Untrusted as e:
            return str(e).partition(" names")[0]
        return ""

    with concurrent.futures.ThreadPoolExecutor() as pool:
        with spec.untrusted("a"), spec.untrusted("b"):
            assert [refused(), pool.submit(refused).result()] == ["a", "a"]
            with pytest.raises(Untrusted, match="a names 's3://b/x'"):
                paths.as_path("s3://b/x")
        with spec.untrusted("b"):
            assert pool.submit(refused).result() == "b"
        assert [refused(), pool.submit(refused).result()] == ["", ""]
