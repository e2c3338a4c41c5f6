"""Names that hold more than letters."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgclf_jax.core.text import printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("é漢 a[b]\\c.png", "é漢 a[b]\\c.png"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\u202egnp.exe", r"\u202egnp.exe"),  # turns the direction of writing
        ("\udcff.png", r"\udcff.png"),  # a byte that is no UTF-8
        ("\x9b31m", r"\x9b31m"),  # one character that begins an escape sequence
    ],
)
def test_escapes(name, shown):
    assert printable(name) == shown


@given(st.text(st.characters()))
def test_what_is_shown_is_printable_and_encodes(name):
    shown = printable(name)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert not any(unicodedata.category(c).startswith("C") for c in shown)
    if name.isprintable():
        assert shown == name
