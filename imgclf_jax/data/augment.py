"""Device ops: batched JAX functions inside the jitted step, keyed by (seed, step).

An op is a function whose first argument is the images [b, h, w, c]; one that draws at random takes a `key` before
it, and is left out in evaluation. Ops before `normalize` see uint8, ops after it float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from imgclf_jax import spec
from imgclf_jax.errors import UserError


def flip_lr(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def pad_crop(key: jax.Array, images: jax.Array, pad: int = 4, mode: str = "constant") -> jax.Array:
    """Pads each side by `pad` pixels and crops back at a place uniform over all (2 * pad + 1)**2.

    `mode` is that of `jnp.pad`: "constant" (zeros), "reflect" or "edge".
    """
    if mode not in ("constant", "reflect", "edge"):
        raise UserError(f"pad_crop(mode={mode!r}): allowed: constant, reflect, edge")
    b, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=mode)
    corners = jax.random.randint(key, (b, 2), 0, 2 * pad + 1)  # [b, (top, left)]

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (h, w, c))

    return jax.vmap(crop)(padded, corners)


def cutout(key: jax.Array, images: jax.Array, size: int = 8, fill: float = 0.0) -> jax.Array:
    """Fills one square of `size` pixels, its centre uniform over the image, cut off at the border.

    DeVries and Taylor 2017, arXiv:1708.04552. `fill` is in the units of the images: put the op after `normalize` to
    fill with the mean. The square covers rows centre - size // 2 to centre - size // 2 + size - 1.
    """
    if images.dtype == jnp.uint8 and fill not in range(256):
        raise UserError(f"cutout(fill={fill}) of uint8 images: allowed are 0 to 255; or put it after normalize")
    b, h, w, _ = images.shape
    key_y, key_x = jax.random.split(key)
    top = jax.random.randint(key_y, (b, 1, 1, 1), 0, h) - size // 2
    left = jax.random.randint(key_x, (b, 1, 1, 1), 0, w) - size // 2
    y, x = jnp.arange(h)[None, :, None, None], jnp.arange(w)[None, None, :, None]
    inside = (y >= top) & (y < top + size) & (x >= left) & (x < left + size)  # [b, h, w, 1]
    return jnp.where(inside, jnp.asarray(fill, images.dtype), images)


def normalize(
    images: jax.Array, mean: float | tuple[float, ...] = 0.0, std: float | tuple[float, ...] = 1.0
) -> jax.Array:
    """uint8 to float32, (x / 255 - mean) / std; `mean` and `std` in [0, 1], one number or one a channel."""
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


DEVICE_OPS: dict[str, Callable] = {"flip_lr": flip_lr, "pad_crop": pad_crop, "cutout": cutout, "normalize": normalize}


def build(text: str, train: bool) -> Callable[[jax.Array | None, jax.Array], jax.Array]:
    """The function (key, images uint8[b, h, w, c]) → f32[b, h, w, c] that a spec of device ops names.

    With `train` False the ops that draw are left out and the key may be None. Each op draws from a key of its own,
    by its place in the spec. Images that no op has made float are scaled to [0, 1]. Raises UserError, when called,
    where the images come out in another shape.
    """
    ops = [spec.bind(call, DEVICE_OPS, "device op", given=("key", "images")) for call in spec.parse(text)]

    def apply(key: jax.Array | None, images: jax.Array) -> jax.Array:
        shape = images.shape
        for i, op in enumerate(ops):
            if not spec.takes(op.func, "key"):
                images = op(images)
            elif train:
                assert key is not None
                images = op(jax.random.fold_in(key, i), images)
        if images.shape != shape:
            raise UserError(
                f"augment={text!r} turns images {list(shape[1:])} into {list(images.shape[1:])}; device ops keep the "
                "shape"
            )
        return normalize(images) if images.dtype == jnp.uint8 else images

    return apply
