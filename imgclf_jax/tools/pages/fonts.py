"""Text in pictures, in Pillow's own font, so that pictures are the same on every machine."""

import unicodedata

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def fitting(text: str, size: int) -> tuple[Font, str]:
    """Returns the font of `size` pixels and the text to draw with it.

    The font has ASCII alone: other characters are written without accents, or as their code, such as `\\u732b`.
    """
    plain = (unicodedata.normalize("NFKD", c).encode("ascii", "ignore") or c.encode("unicode_escape") for c in text)
    return ImageFont.load_default(size), b"".join(plain).decode("ascii")
