"""Images as pictures: their colors, text in them, and PNG embedded in a page."""

import base64
import io
import unicodedata

import numpy as np
from PIL import Image, ImageFont

from imgclf_jax.data.resizing import to_uint8
from imgclf_jax.tools.pages.html import text

MAX = 128  # pixels of the longer side; larger images are shrunk


type Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def fitting(text: str, size: int) -> tuple[Font, str]:
    """Returns Pillow's own font of `size` pixels, the same on every machine, and the text to draw with it.

    The font has ASCII alone: other characters are written without accents, or as their code, such as `\\u732b`.
    """
    plain = (unicodedata.normalize("NFKD", c).encode("ascii", "ignore") or c.encode("unicode_escape") for c in text)
    return ImageFont.load_default(size), b"".join(plain).decode("ascii")


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Converts uint8[h, w, c] to uint8[h, w, 3]: the first of one or two channels in gray, else the first three."""
    return image[..., :1].repeat(3, -1) if image.shape[-1] < 3 else image[..., :3]


def tag(image: np.ndarray, alt: str, colors: int = 0) -> str:
    """Returns an `img` element for uint8[h, w, c], or f32[h, w, c] in [0, 1].

    One channel is gray, three are RGB; of two the first is shown, of more than three the first three. Small images are
    enlarged in whole pixels. `colors`, up to 256, makes the file smaller by quantizing colors.
    """
    image = to_uint8(image)
    picture = Image.fromarray(image[..., :3] if image.shape[-1] > 2 else image[..., 0])
    small = max(picture.size) < MAX
    picture.thumbnail((MAX, MAX), Image.Resampling.LANCZOS)
    if colors:
        # MAXCOVERAGE keeps rare colors, such as the yellow of a small hot spot.
        picture = picture.quantize(colors, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    content = io.BytesIO()
    picture.save(content, "png", optimize=True)
    data = base64.b64encode(content.getvalue()).decode("ascii")
    return (f'<img{' class="small"' if small else ""} width="{picture.width}" height="{picture.height}" '
            f'alt="{text(alt)}" src="data:image/png;base64,{data}">')  # fmt: skip
