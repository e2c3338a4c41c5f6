"""Images inside of a page, as PNG."""

import base64
import io

import numpy as np
from PIL import Image

from imgclf_jax.pages.html import text

MOST = 128  # pixels of the longer side; larger images are made smaller


def tag(image: np.ndarray, alt: str) -> str:
    """An `img` element of uint8[h, w, c], or of f32[h, w, c] in [0, 1]; what is outside is cut off.

    One channel is grey, three are red, green and blue. Of two the first is shown, of more than three the first three.
    Small images are enlarged in whole pixels.
    """
    if image.dtype != np.uint8:
        image = np.round(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(image[..., :3] if image.shape[-1] > 2 else image[..., 0])
    small = max(picture.size) < MOST
    picture.thumbnail((MOST, MOST), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "png", optimize=True)
    data = base64.b64encode(content.getvalue()).decode("ascii")
    return (f'<img{' class="small"' if small else ""} width="{picture.width}" height="{picture.height}" '
            f'alt="{text(alt)}" src="data:image/png;base64,{data}">')  # fmt: skip
