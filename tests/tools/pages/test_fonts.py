"""Text in pictures, which is drawn whatever its characters, and never as boxes."""

import shutil

import numpy as np
import pytest

from imgclf_jax.tools.explain import heatmap
from imgclf_jax.tools.pages import contact_sheet, fonts

TEXT = "größe-猫-Ωй"


def test_ascii_is_drawn_in_the_same_font_everywhere():
    font, text = fonts.fitting("a: 0.5", 15)
    assert text == "a: 0.5"
    assert font.getname() == fonts.ImageFont.load_default(15).getname()


def test_what_no_font_has_is_spelled(monkeypatch):
    monkeypatch.setattr(fonts, "_candidates", lambda character: iter(()))
    assert fonts.fitting("größe, é, 猫", 15)[1] == "gro\\xdfe, e, \\u732b"


def test_a_font_that_has_all_of_it_is_preferred(monkeypatch):
    """Else the one that lacks the least; each character that is drawn differs from one that is missing."""
    for text in ("größe", "Ωй", TEXT):
        font, shown = fonts.fitting(text, 15)
        missing = bytes(font.getmask("\U0010fffe"))
        assert all(bytes(font.getmask(c)) != missing for c in shown if not c.isspace())
        assert len({bytes(font.getmask(c)) for c in shown}) == len(set(shown))


@pytest.mark.skipif(not fonts._of_system("DejaVuSans.ttf"), reason="needs DejaVu, such as Debian's fonts-dejavu-core")
def test_an_umlaut_stays_where_a_font_has_it():
    assert fonts.fitting("größe Ω й", 15)[1] == "größe Ω й"


def test_pictures_of_such_names_have_their_text(monkeypatch):
    """Different names make different pictures, where boxes would make the same."""
    image = np.zeros((8, 8, 1), np.uint8)
    drawn = [heatmap.draw(image, np.eye(4), False, [name, "b"]) for name in ("ö", "ü")]
    assert np.any(np.asarray(drawn[0]) != np.asarray(drawn[1]))
    sheets = [contact_sheet.draw(image[None], [["a", name]]) for name in ("ö", "ü", "猫", "犬")]
    assert len({np.asarray(sheet).tobytes() for sheet in sheets}) == 4


def test_a_font_that_fontconfig_names_is_a_file():
    if shutil.which("fc-match"):
        assert fonts._of_fontconfig(ord("ö")).endswith((".ttf", ".ttc", ".otf", ".pfb", ".woff"))
    assert fonts._of_system("no-such-font.ttf") == ""
