"""Images inside of a page, as PNG."""

import base64
import io

import numpy as np
from PIL import Image

from imgclf_jax.tools.pages.html import text

MOST = 128  # pixels of the longer side; larger images are made smaller


def levels(image: np.ndarray) -> np.ndarray:
    """uint8 of f32 in [0, 1], what is outside being cut off; uint8 as it is."""
    if image.dtype == np.uint8:
        return image
    return np.round(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)


def tag(image: np.ndarray, alt: str, colors: int = 0) -> str:
    """An `img` element of uint8[h, w, c], or of f32[h, w, c] in [0, 1]; what is outside is cut off.

    One channel is grey, three are red, green and blue. Of two the first is shown, of more than three the first three.
    Small images are enlarged in whole pixels. With `colors` the file is smaller: it has so many colors at most, up to
    256, chosen so that none of the image's is far from them.
    """
    image = levels(image)
    picture = Image.fromarray(image[..., :3] if image.shape[-1] > 2 else image[..., 0])
    small = max(picture.size) < MOST
    picture.thumbnail((MOST, MOST), Image.Resampling.LANCZOS)
    if colors:
        # Rare colors count as much as frequent ones: a map's small hot place keeps its yellow.
        picture = picture.quantize(colors, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    content = io.BytesIO()
    picture.save(content, "png", optimize=True)
    data = base64.b64encode(content.getvalue()).decode("ascii")
    return (f'<img{' class="small"' if small else ""} width="{picture.width}" height="{picture.height}" '
            f'alt="{text(alt)}" src="data:image/png;base64,{data}">')  # fmt: skip
