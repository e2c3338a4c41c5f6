"""Device ops: batched JAX functions inside the jitted step, keyed by (seed, step).

An op maps images [b, h, w, c] to images of the same shape. Its kind (see `core.kinds`) declares its other arguments:
none, a key, or a key with example ids and epochs. Evaluation applies only ops of the first kind. Ops before `normalize`
see uint8, ops after it float32.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from imgclf_jax.augment import geometry, photometric, policies
from imgclf_jax.core import kinds, rng, spec
from imgclf_jax.core.errors import UserError


@kinds.random
def flip_lr(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


@kinds.by_example
def flip_alternating(key: jax.Array, images: jax.Array, ids: jax.Array, epochs: jax.Array) -> jax.Array:
    """Mirrors a random half of the examples in even epochs, and the other half in odd ones.

    Any two consecutive epochs thus show each example both ways (Jordan 2024, arXiv:2404.00498, section 3.6).
    """
    first = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i)))(ids)  # u32[b]
    flip = (first + epochs.astype(jnp.uint32)) % 2 == 1
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


@kinds.random
def pad_crop(key: jax.Array, images: jax.Array, pad: int = 4, mode: str = "constant") -> jax.Array:
    """Pads each side by `pad` pixels and crops to the original size, at one of (2 * pad + 1)**2 offsets.

    `mode` is as in `jnp.pad`, such as "constant" (zeros), "reflect" or "edge".
    """
    b, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=mode)
    corners = jax.random.randint(key, (b, 2), 0, 2 * pad + 1)  # [b, (top, left)]
    crop = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (h, w, c)))
    return crop(padded, corners)


@kinds.random
def cutout(key: jax.Array, images: jax.Array, size: int = 8, fill: float = 0.0) -> jax.Array:
    """Fills a square of `size` by `size` pixels in each image (DeVries and Taylor 2017, arXiv:1708.04552).

    Its centre is uniform over the image, and the border clips it. After `normalize`, a `fill` of 0 is the mean.
    """
    b, h, w, _ = images.shape
    key_y, key_x = jax.random.split(key)
    top = jax.random.randint(key_y, (b,), 0, h) - size // 2
    left = jax.random.randint(key_x, (b,), 0, w) - size // 2
    inside = geometry.in_box(h, w, top, left, top + size, left + size)
    return jnp.where(inside, photometric.fill_values("cutout", images, fill), images)


def normalize(
    images: jax.Array, mean: float | tuple[float, ...] = 0.0, std: float | tuple[float, ...] = 1.0
) -> jax.Array:
    """Converts uint8 to float32, (x / 255 - mean) / std; `mean` and `std` in [0, 1], one number or one per channel."""
    if np.max(mean) > 1 or np.min(std) <= 0 or np.max(std) > 1:
        raise UserError(f"normalize(mean={mean}, std={std}): std must be above 0, and both at most 1; divide those of "
                        "pixels from 0 to 255 by 255")  # fmt: skip
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


@kinds.random
def random_erasing(
    key: jax.Array, images: jax.Array, probability: float = 0.5, area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 10 / 3), fill: float | str = 0.0,
) -> jax.Array:  # fmt: skip
    """Fills a random box in each image with a `probability` (Zhong et al. 2017, arXiv:1708.04896).

    - `area`: the range of the box's share of the image, drawn uniformly.
    - `aspect`: the range of its height / width, log-uniform. As in timm, the first of ten boxes that fits is used.
    - `fill`: a number in the units of the images, "pixel" for noise per pixel, or "color" for one random color per box.
      Random values are uniform over 0 … 255 in uint8 images, and standard normal in float ones.
    """
    b, h, w, c = images.shape
    key_apply, key_area, key_aspect, key_y, key_x, key_fill = jax.random.split(key, 6)
    target = jax.random.uniform(key_area, (10, b), minval=area[0], maxval=area[1]) * (h * w)
    logs = jax.random.uniform(key_aspect, (10, b), minval=math.log(aspect[0]), maxval=math.log(aspect[1]))
    heights, widths = jnp.round(jnp.sqrt(target * jnp.exp(logs))), jnp.round(jnp.sqrt(target / jnp.exp(logs)))
    fits = (heights < h) & (widths < w)
    first = jnp.argmax(fits, 0)[None]
    height, width = (jnp.take_along_axis(v, first, 0)[0].astype(jnp.int32) for v in (heights, widths))  # [b]
    top = jax.random.randint(key_y, (b,), 0, h - height + 1)
    left = jax.random.randint(key_x, (b,), 0, w - width + 1)
    erase = jax.random.bernoulli(key_apply, float(probability), (b,)) & jnp.any(fits, 0)
    inside = erase[:, None, None, None] & geometry.in_box(h, w, top, left, top + height, left + width)
    if fill not in ("pixel", "color"):
        return jnp.where(inside, photometric.fill_values("random_erasing", images, fill), images)
    shape = images.shape if fill == "pixel" else (b, 1, 1, c)
    return jnp.where(inside, _noise(key_fill, shape, images.dtype), images)


def _noise(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Uniform bytes, or normal floats on 2**16 levels; each random word makes two or four of them, which is faster."""
    width = 8 if dtype == jnp.uint8 else 16
    size, pieces = math.prod(shape[1:]), 32 // width
    words = jax.random.bits(key, (shape[0], -(-size // pieces), 1), jnp.uint32)
    cut = words >> (width * jnp.arange(pieces, dtype=jnp.uint32)) & (2**width - 1)
    cut = cut.reshape(shape[0], -1)[:, :size].reshape(shape)
    if dtype == jnp.uint8:
        return cut.astype(jnp.uint8)
    return (math.sqrt(2) * jax.lax.erf_inv((cut.astype(jnp.float32) + 0.5) / 32768 - 1)).astype(dtype)


DEVICE_OPS: dict[str, Callable] = {
    f.__name__: f
    for f in (flip_lr, flip_alternating, pad_crop, cutout, random_erasing, policies.color_jitter, policies.randaugment,
              policies.trivialaugment, normalize)
}  # fmt: skip

_LEADING = {kinds.PLAIN: ("images",), kinds.RANDOM: ("key", "images"),
            kinds.BY_EXAMPLE: ("key", "images", "ids", "epochs")}  # fmt: skip


def _bind(text: str) -> list[functools.partial[Any]]:
    calls = spec.parse(text)
    if [call.name for call in calls].count("normalize") > 1:
        raise UserError(f"augment={text!r}: normalize occurs twice, and each divides by 255; keep one of them")
    return [kinds.bind(call, DEVICE_OPS, "device op", _LEADING) for call in calls]


def needs_ids(text: str) -> bool:
    """Whether a spec has a by-example op, so batches must carry example ids and epochs."""
    return any(kinds.kind_of(op) == kinds.BY_EXAMPLE for op in _bind(text))


def evaluation_spec(text: str) -> str:
    """The spec of the deterministic ops, which evaluation applies."""
    calls = zip(spec.parse(text), _bind(text), strict=True)
    return "|".join(str(call) for call, op in calls if kinds.kind_of(op) == kinds.PLAIN)


def divides_twice(text: str, image_shape: tuple[int, ...]) -> bool:
    """Whether an op before `normalize` returns pixels of about 0 to 1, which `normalize` would divide by 255 again."""
    calls = spec.parse(text)
    names = [call.name for call in calls]
    before = "|".join(map(str, calls[: names.index("normalize")])) if "normalize" in names else ""
    if not spec.names_code(before):
        return False
    ramp = np.linspace(0, 255, math.prod(image_shape)).astype(np.uint8).reshape(1, *image_shape)
    run = build(f"{before}|normalize", train=True)
    return bool(jnp.max(run(jax.random.key(0), ramp, jnp.uint32(0), *np.zeros((2, 1), np.int32))) <= 4 / 255)


def pixel_range(text: str, channels: int) -> tuple[jax.Array, jax.Array]:
    """The least and greatest values f32[1, 1, 1, channels] of a pixel after the ops of a spec.

    Raises UserError if evaluation applies any op but `normalize`, since the scale is then not fixed.
    """
    if others := [str(call) for call in spec.parse(evaluation_spec(text)) if call.name != "normalize"]:
        raise UserError(f"augment={text!r}: an attack needs a fixed scale from pixels to model inputs, which "
                        f"{others[0]} changes; keep normalize as the only deterministic op")  # fmt: skip
    ends = [build(text, False)(None, jnp.full((1, 1, 1, channels), value, jnp.uint8)) for value in (0, 255)]
    return jnp.minimum(*ends), jnp.maximum(*ends)


def build(text: str, train: bool) -> Callable[..., jax.Array]:
    """Returns the function (key, images uint8[b, h, w, c]) → f32[b, h, w, c] that a spec of device ops names.

    For by-example ops (see `needs_ids`) it also takes the run's `seed` u32[], and `ids` and `epochs` i32[b]. Without
    `train` it skips the random ops, and the key may be None. It scales final uint8 images to [0, 1]. Raises UserError
    if the ops change the shape of the images, and if that scaling would differ between training and evaluation.

    An op's draws depend on its name and the number of earlier ops of that name, so another op does not change them.
    """
    calls, ops = spec.parse(text), _bind(text)
    numbered = list(zip(ops, [call.name for call in calls], spec.occurrences(calls), strict=True))

    def run(train: bool, images: jax.Array, key: Any = None, *known: jax.Array) -> Any:
        for op, name, occurrence in numbered:
            kind = kinds.kind_of(op)
            if kind == kinds.PLAIN:
                images = op(images)
            elif train and kind == kinds.RANDOM:
                images = op(rng.fold(key, name, occurrence), images)
            elif train:
                seed, ids, epochs = known
                images = op(rng.key(seed, name, occurrence), images, ids, epochs)
        return images

    def apply(key: jax.Array | None, images: jax.Array, *known: jax.Array) -> jax.Array:
        out: jax.Array = run(train, images, key, *known)
        if out.shape != images.shape or not (out.dtype == jnp.uint8 or jnp.issubdtype(out.dtype, jnp.floating)):
            raise UserError(f"augment={text!r} turns images {list(images.shape[1:])} into {out.dtype}"
                            f"{list(out.shape[1:])}; device ops keep the shape and return uint8 or float")  # fmt: skip
        evaluated = jax.eval_shape(functools.partial(run, False), images).dtype
        if (out.dtype == jnp.uint8) != (evaluated == jnp.uint8):
            raise UserError(f"augment={text!r} makes {out.dtype} images in training, but {evaluated} ones in "
                            "evaluation, which skips random ops and scales uint8 to [0, 1]; add normalize, or return "
                            "images of the given dtype from the random ops")  # fmt: skip
        return normalize(out) if out.dtype == jnp.uint8 else out

    return apply


def normalization(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean and standard deviation, f32[] or f32[c], of `normalize` in the spec `text`; 0 and 1 without one."""
    call = next((call for call in spec.parse(text) if call.name == "normalize"), spec.Call("normalize"))
    arguments = inspect.signature(spec.bind(call, DEVICE_OPS, "device op", leading=("images",))).parameters
    return np.asarray(arguments["mean"].default, np.float32), np.asarray(arguments["std"].default, np.float32)


def to_pixels(images: np.ndarray, text: str) -> np.ndarray:
    """Undoes `normalize` in the images f32[b, h, w, c] that the ops of the spec `text` return: f32 in [0, 1]."""
    mean, std = normalization(text)
    return np.clip(images * std + mean, 0, 1).astype(np.float32)
