"""Test-time augmentation (TTA): averages a model's logits over several views of each image.

A view op takes no images, only its own arguments, and returns [(weight, function)]. The weights are relative, and each
function maps images [b, h, w, c] to images of the same shape.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from imgclf_jax.core import kinds, spec
from imgclf_jax.core.errors import UserError

Views = list[tuple[float, Callable[[jax.Array], jax.Array]]]
NONE: Views = [(1.0, lambda x: x)]


def flip() -> Views:
    """The image and its mirror image (1/2 each)."""
    return [(0.5, lambda x: x), (0.5, lambda x: x[:, :, ::-1])]


def translate(pad: int = 1) -> Views:
    """The image (1/2), and the image shifted by `pad` pixels down and right, and up and left (1/4 each).

    The border is padded by reflection, as in airbench94 (Jordan 2024, arXiv:2404.00498, section 3.5).
    """

    def crop(images: jax.Array, offset: int) -> jax.Array:
        h, w = images.shape[1:3]
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
        return padded[:, offset : offset + h, offset : offset + w]

    return [(0.5, lambda x: x), (0.25, lambda x: crop(x, 0)), (0.25, lambda x: crop(x, 2 * pad))]


VIEWS: dict[str, Callable[..., Views]] = {"flip": flip, "translate": translate}


def build(text: str) -> Views:
    """Returns the views that a spec names, with weights that sum to 1; for empty text only the image.

    Each op applies to all views of the ops after it, and their weights multiply. `flip|translate(1)` is thus the three
    translated views and their mirror images, the six views of airbench94.
    """
    views = NONE
    for call in reversed(spec.parse(text)):
        op = kinds.bind(call, VIEWS, "view", {kinds.PLAIN: ()})()
        total = sum(one[0] for one in op if isinstance(one, tuple)) if isinstance(op, list) else 0
        if total <= 0:
            raise UserError(f"tta={text!r}: {call} must return [(weight, function), …] with a sum of weights above 0")
        views = [(a * b / total, functools.partial(_compose, f, g)) for a, f in views for b, g in op]
    return views


def _compose(first: Callable[..., jax.Array], second: Callable[..., jax.Array], images: jax.Array) -> jax.Array:
    return second(first(images))


def mean_logits(views: Views, logits: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
    """The weighted mean of the views' logits, f32[b, classes], computed in one batch."""
    if len(views) == 1:
        return logits(views[0][1](images))
    b = images.shape[0]
    # The batch stays the outer axis, so each device keeps its images.
    stacked = jnp.stack([view(images) for _, view in views], 1)  # [b, views, h, w, c]
    out = logits(stacked.reshape(b * len(views), *images.shape[1:])).reshape(b, len(views), -1)
    return jnp.einsum("bvc,v->bc", out, jnp.asarray([weight for weight, _ in views], out.dtype), precision="highest")
