"""Text in pictures, which is drawn whatever its characters, and never as boxes."""

import numpy as np

from imgclf_jax.tools.pages import contact_sheet, fonts


def test_other_characters_are_spelled_in_ascii():
    assert fonts.fitting("a: 0.5", 15)[1] == "a: 0.5"
    assert fonts.fitting("größe, é, 猫", 15)[1] == "gro\\xdfe, e, \\u732b"


def test_different_names_make_different_pictures():
    image = np.zeros((8, 8, 1), np.uint8)
    sheets = [contact_sheet.draw(image[None], [["a", name]]) for name in ("猫", "犬")]
    assert len({np.asarray(sheet).tobytes() for sheet in sheets}) == 2
