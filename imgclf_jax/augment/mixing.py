"""Mixing: each image with another of its batch, and its loss with that of the other's label.

A mixing op takes `(key, images, …)` and gives (images, weight f32[b]): image i mixed with image i - 1, the first with
the last, and the share of image i that is left. The order of a batch being random, that neighbour is a random example;
and it lies on the same device, but for the first of each.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.losses import Loss

Mixed = tuple[jax.Array, jax.Array]  # images [b, h, w, c], weight f32[b] of their own labels
Mix = Callable[[jax.Array, jax.Array], Mixed]  # (key, images)


def partner(x: jax.Array) -> jax.Array:
    """What each example is mixed with: of images or labels [b, …], the one before it."""
    return jnp.roll(x, 1, axis=0)


def _draw_weights(name: str, key: jax.Array, images: jax.Array, alpha: float) -> jax.Array:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"{name} mixes float images, these are {images.dtype}")
    if alpha <= 0:
        raise UserError(f"{name}(alpha={alpha}): must be above 0")
    # The share of one gamma variate in the sum of two, as in jax.random.beta, which takes twice as long to compile.
    logs = jax.random.loggamma(key, alpha, (2, images.shape[0]))
    return jax.nn.sigmoid(logs[0] - logs[1])


def mixup(key: jax.Array, images: jax.Array, alpha: float = 0.2, probability: float | None = None) -> Mixed:
    """weight * image + (1 - weight) * other, weight ~ Beta(alpha, alpha) (Zhang et al. 2017, arXiv:1710.09412).

    A weight for each image, as in the paper's definition: the gradient varies less than with one a batch. `probability`
    is that of the op in a batch, see `build`.
    """
    del probability
    weight = _draw_weights("mixup", key, images, alpha)
    own = weight.astype(images.dtype)[:, None, None, None]
    return own * images + (1 - own) * partner(images), weight


def cutmix(key: jax.Array, images: jax.Array, alpha: float = 1.0, probability: float | None = None) -> Mixed:
    """A box of the other image pasted in (Yun et al. 2019, arXiv:1905.04899).

    Its sides are the image's by sqrt(1 - weight), weight ~ Beta(alpha, alpha), its centre uniform over the image; it is
    cut off at the border, and the weight is then the share of the area that is left. `probability` as for mixup.
    """
    del probability
    b, h, w, _ = images.shape
    key_weight, key_y, key_x = jax.random.split(key, 3)
    side = jnp.sqrt(1 - _draw_weights("cutmix", key_weight, images, alpha))  # [b]

    def interval(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:  # i32[b] each
        half = (size * side).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (b,), 0, size)
        return jnp.maximum(centre - half, 0), jnp.minimum(centre + half, size)

    (top, bottom), (left, right) = interval(key_y, h), interval(key_x, w)
    y, x = jnp.arange(h)[:, None, None], jnp.arange(w)[:, None]
    inside = (y >= _each(top)) & (y < _each(bottom)) & (x >= _each(left)) & (x < _each(right))  # [b, h, w, 1]
    pasted = ((bottom - top) * (right - left)).astype(jnp.float32)
    return jnp.where(inside, partner(images), images), 1 - pasted / (h * w)


def _each(x: jax.Array) -> jax.Array:
    return x[:, None, None, None]


MIXES: dict[str, Callable[..., Mixed]] = {"mixup": mixup, "cutmix": cutmix}


def build(text: str) -> Mix | None:
    """The function (key, images) → (images, weight) that a spec of mixing ops names; None for the empty text.

    For each batch one of the ops is drawn. Those without a `probability` share equally what the others leave; if all
    have one, the rest of the batches is left unmixed.
    """
    ops = [spec.bind(call, MIXES, "mix", given=("key", "images")) for call in spec.parse(text)]
    if not ops:
        return None
    given = [op.keywords.get("probability") for op in ops]
    known = [p for p in given if p is not None]
    if not all(isinstance(p, int | float) and 0 <= p <= 1 for p in known) or (total := sum(known)) > 1 + 1e-6:
        raise UserError(f"mix={text!r}: each probability is a number from 0 to 1, all together at most 1")
    rest = (1 - total) / max(1, given.count(None))
    limits = np.cumsum([rest if p is None else p for p in given], dtype=np.float32)
    branches = [*ops] if None in given or total > 1 - 1e-6 else [*ops, _unmixed]

    def mix(key: jax.Array, images: jax.Array) -> Mixed:
        key_choice, key_op = jax.random.split(key)
        if len(branches) == 1:
            return branches[0](key_op, images)
        choice = jnp.sum(jax.random.uniform(key_choice) >= limits[: len(branches) - 1], dtype=jnp.int32)
        return jax.lax.switch(choice, branches, key_op, images)

    return mix


def _unmixed(key: jax.Array, images: jax.Array) -> Mixed:
    return images, jnp.ones(images.shape[0], jnp.float32)


def mixed_loss(loss: Loss, logits: jax.Array, labels: jax.Array, others: jax.Array, weight: jax.Array) -> jax.Array:
    """weight * loss(logits, own label) + (1 - weight) * loss(logits, the other's), f32[b].

    For a loss that is linear in the target, as cross-entropy is, the loss against the mixed target itself.
    """
    return weight * loss(logits, labels) + (1 - weight) * loss(logits, others)


def main_labels(labels: jax.Array, weight: jax.Array) -> jax.Array:
    """Of the own label and the other's, that of the greater weight: what training accuracy counts against."""
    return jnp.where(weight >= 0.5, labels, partner(labels))
