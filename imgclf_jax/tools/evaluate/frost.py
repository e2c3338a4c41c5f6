"""The corruption `frost`: overlays the authors' photographs of frost, which are not shipped here.

As in the authors' code (see `corruptions`), a random crop of one of five photographs is added to the image. For small
images the photographs are shrunk to a fifth.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from imgclf_jax.core import paths, rng
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.tools.evaluate.fields import Constant, Constants, Tables

# The published code lists a sixth one, but draws from these five.
FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
SOURCE = "the folder ImageNet-C/create_c of github.com/hendrycks/robustness"
_FIFTH = slice(2, None, 5)  # OpenCV's resizing to a fifth reads the middle pixel of each five


def read(folder: Path) -> tuple[np.ndarray, ...]:
    """Reads the five photographs uint8[h, w, 3] from a folder. Raises UserError for missing or broken files."""
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise UserError(f"--frost={folder}: the folder lacks {', '.join(missing)}; download {FILES[0]} to {FILES[-1]} "
                        f"from {SOURCE}")  # fmt: skip
    photographs = []
    for name in FILES:
        try:
            with paths.open_regular(folder / name) as file, Image.open(file) as opened:
                photographs.append(np.asarray(opened.convert("RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            cause = reason(e) if isinstance(e, OSError) else e
            raise UserError(
                f"cannot read {folder / name} as an image ({cause}); download it again from {SOURCE}"
            ) from e
    return tuple(photographs)


def weights(constant: Constant, h: int, w: int, constants: Constants) -> Tables:
    """Returns the weights of the `image` and the `frost`."""
    return {"image": np.float32(constant[0]), "frost": np.float32(constant[1])}


def fit_photographs(photographs: Sequence[np.ndarray], shape: tuple[int, ...], small: bool) -> Tables:
    """Returns `photographs` uint8[n, H, W, c] for images of `shape` (h, w, c), and their `sizes` i32[n, 2].

    They are shrunk to a fifth for `small` images, converted to grayscale if the images are, and enlarged bilinearly
    unless larger than the images. Zeros, which are never read, pad smaller ones.
    """
    h, w, c = shape
    fitted = []
    for photograph in photographs:
        image = Image.fromarray(photograph[_FIFTH, _FIFTH] if small else photograph)
        if (factor := max((h + 1) / image.height, (w + 1) / image.width)) > 1:
            size = max(w + 1, round(factor * image.width)), max(h + 1, round(factor * image.height))
            image = image.resize(size, Image.Resampling.BILINEAR)
        fitted.append(np.asarray(image if c == 3 else image.convert("L")).reshape(image.height, image.width, c))
    sizes = np.array([photograph.shape[:2] for photograph in fitted], np.int32)
    padded = np.zeros((len(fitted), *sizes.max(0), c), np.uint8)
    for row, photograph in zip(padded, fitted, strict=True):
        row[: photograph.shape[0], : photograph.shape[1]] = photograph
    return {"photographs": padded, "sizes": sizes}


def draw(key: jax.Array, image: jax.Array, tables: Tables) -> jax.Array:
    """Draws a photograph, and the first row and column of a crop, i32[3]; as published, never the last offset."""
    h, w = image.shape[:2]
    index = jax.random.randint(rng.fold(key, "photograph"), (), 0, tables["sizes"].shape[0], jnp.int32)
    limits = jnp.asarray(tables["sizes"])[index] - jnp.array([h, w], jnp.int32)
    first = jax.random.randint(rng.fold(key, "place"), (2,), 0, limits, jnp.int32)
    return jnp.concatenate([index[None], first])


def frost(images: jax.Array, tables: Tables, draws: jax.Array) -> jax.Array:
    """Returns the weighted sum of uint8[b, h, w, c] and the photographs' crops at `draws` i32[b, 3]."""
    shape = (1, *images.shape[1:])
    crops = jax.vmap(lambda at: jax.lax.dynamic_slice(tables["photographs"], (*at, jnp.int32(0)), shape)[0])(draws)
    levels = tables["image"] * images.astype(jnp.float32) + tables["frost"] * crops.astype(jnp.float32)
    return jnp.floor(jnp.clip(levels, 0, 255) + 1e-4).astype(jnp.uint8)
