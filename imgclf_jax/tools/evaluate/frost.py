"""The corruption `frost`: photographs of frost laid over images. They are the authors' and are not shipped with this.

The definition is that of the authors' programs: see `corruptions`. One of five photographs is cut at a random place to
the image's size, and added to the image. For small images the photographs are a fifth as large.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from imgclf_jax.core import rng
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.tools.evaluate.fields import Tables

# The published programs list a sixth one, and draw from these five.
FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
SOURCE = "the folder ImageNet-C/create_c of github.com/hendrycks/robustness"
_FIFTH = slice(2, None, 5)  # the pixels that OpenCV's resizing to a fifth reads: the middle one of each five


def read(folder: Path) -> tuple[np.ndarray, ...]:
    """The five photographs uint8[h, w, 3] of a folder. Raises UserError, naming them, for missing or broken files."""
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise UserError(f"--frost={folder}: {', '.join(missing)} not found there; the photographs {FILES[0]} to "
                        f"{FILES[-1]} are in {SOURCE}")  # fmt: skip
    photographs = []
    for name in FILES:
        try:
            with Image.open(folder / name) as opened:
                photographs.append(np.asarray(opened.convert("RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            cause = reason(e) if isinstance(e, OSError) else e
            raise UserError(f"{folder / name} cannot be read as an image ({cause}); copy it again from {SOURCE}") from e
    return tuple(photographs)


def shares(constant: Any, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """The shares that the `image` and the `frost` have."""
    return {"image": np.float32(constant[0]), "frost": np.float32(constant[1])}


def fitted(photographs: Sequence[np.ndarray], shape: tuple[int, ...], small: bool) -> Tables:
    """The `photographs` uint8[n, H, W, c] for images of a `shape` (h, w, c), and the `sizes` i32[n, 2] of each.

    Those for `small` images are a fifth as large. A photograph that is not larger than the images is enlarged,
    bilinearly; for grey images it is grey. Beyond the end of a smaller one are zeros, which are not read.
    """
    h, w, c = shape
    fitting = []
    for photograph in photographs:
        own = Image.fromarray(photograph[_FIFTH, _FIFTH] if small else photograph)
        if (times := max((h + 1) / own.height, (w + 1) / own.width)) > 1:
            size = max(w + 1, round(times * own.width)), max(h + 1, round(times * own.height))
            own = own.resize(size, Image.Resampling.BILINEAR)
        fitting.append(np.asarray(own if c == 3 else own.convert("L")).reshape(own.height, own.width, c))
    sizes = np.array([one.shape[:2] for one in fitting], np.int32)
    whole = np.zeros((len(fitting), *sizes.max(0), c), np.uint8)
    for place, one in zip(whole, fitting, strict=True):
        place[: one.shape[0], : one.shape[1]] = one
    return {"photographs": whole, "sizes": sizes}


def draw(key: jax.Array, image: jax.Array, tables: Tables) -> jax.Array:
    """Which photograph, and the first row and column of it, i32[3]. As published, the last place is not drawn."""
    h, w = image.shape[:2]
    which = jax.random.randint(rng.fold(key, "photograph"), (), 0, tables["sizes"].shape[0], jnp.int32)
    places = jnp.asarray(tables["sizes"])[which] - jnp.array([h, w], jnp.int32)
    first = jax.random.randint(rng.fold(key, "place"), (2,), 0, places, jnp.int32)
    return jnp.concatenate([which[None], first])


def frost(images: jax.Array, tables: Tables, draws: jax.Array) -> jax.Array:
    """The share `image` of uint8[b, h, w, c] plus the share `frost` of the photographs at `draws` i32[b, 3]."""
    shape = (1, *images.shape[1:])
    seen = jax.vmap(lambda at: jax.lax.dynamic_slice(tables["photographs"], (*at, jnp.int32(0)), shape)[0])(draws)
    levels = tables["image"] * images.astype(jnp.float32) + tables["frost"] * seen.astype(jnp.float32)
    return jnp.floor(jnp.clip(levels, 0, 255) + 1e-4).astype(jnp.uint8)
