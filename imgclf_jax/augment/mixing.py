"""Mixing: each image is mixed with another one of its batch, and so are their targets, or the losses of their labels.

A mixing op takes `(key, images, …)`, or `(images, …)` if it draws nothing (see `core.kinds`). It gives (images, weight
f32[b]): image i is mixed with image i - 1, the first one with the last, and the weight is the share that image i keeps.
The order of a batch is random, so that this neighbour is a random example. It lies on the same device, but for the
first image of each device.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core import kinds, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.losses import Loss, Task

Mixed = tuple[jax.Array, jax.Array]  # images [b, h, w, c], weight f32[b] of their own labels
Mix = Callable[[jax.Array, jax.Array], Mixed]  # (key, images)


def partner(x: jax.Array) -> jax.Array:
    """What each example is mixed with: of images or labels [b, …], the one before it."""
    return jnp.roll(x, 1, axis=0)


def _draw_weights(name: str, key: jax.Array, images: jax.Array, alpha: float, count: int) -> jax.Array:
    """f32[count] ~ Beta(alpha, alpha)."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"{name} mixes float images, these are {images.dtype}")
    if alpha <= 0:
        raise UserError(f"{name}(alpha={alpha}): must be above 0")
    # The share of one gamma variate in the sum of two, as in jax.random.beta, which takes twice as long to compile.
    logs = jax.random.loggamma(key, alpha, (2, count))
    return jax.nn.sigmoid(logs[0] - logs[1])


@kinds.random
def mixup(
    key: jax.Array,
    images: jax.Array,
    alpha: float = 0.2,
    probability: float | None = None,
    per_batch: bool = False,
) -> Mixed:
    """weight * image + (1 - weight) * other, weight ~ Beta(alpha, alpha) (Zhang et al. 2017, arXiv:1710.09412).

    Each image has a weight of its own, as in the paper's definition: the gradient varies less than with one for the
    batch. With `per_batch` one draw a serves the whole batch, and the weight is max(a, 1 - a), as in big_vision
    (Beyer et al. 2022, arXiv:2205.01580). `probability` is how often a batch is mixed by this op: see `build`.
    """
    del probability
    weight = _draw_weights("mixup", key, images, alpha, 1 if per_batch else images.shape[0])
    if per_batch:
        weight = jnp.broadcast_to(jnp.maximum(weight, 1 - weight), images.shape[:1])
    own = weight.astype(images.dtype)[:, None, None, None]
    return own * images + (1 - own) * partner(images), weight


@kinds.random
def cutmix(key: jax.Array, images: jax.Array, alpha: float = 1.0, probability: float | None = None) -> Mixed:
    """A box of the other image is pasted in (Yun et al. 2019, arXiv:1905.04899).

    The box's sides are sqrt(1 - weight) of the image's, weight ~ Beta(alpha, alpha). Its centre is uniform over the
    image. The border cuts the box off, and the weight is then the share of the area that is left. `probability` as for
    mixup.
    """
    del probability
    b, h, w, _ = images.shape
    key_weight, key_y, key_x = jax.random.split(key, 3)
    side = jnp.sqrt(1 - _draw_weights("cutmix", key_weight, images, alpha, b))  # [b]

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

_GIVEN = {kinds.PLAIN: ("images",), kinds.RANDOM: ("key", "images")}


def build(text: str, task: Task = Task.CLASSES) -> Mix | None:
    """The function (key, images) → (images, weight) that a spec of mixing ops names; None for the empty text.

    One of the ops is drawn for each batch. Ops without a `probability` have equal shares of what the others leave. If
    all have one, the other batches stay unmixed. What an op draws does not depend on which other ops there are.
    Raises UserError for `cutmix` in a regression.
    """
    if task is Task.REGRESSION and any(call.name == "cutmix" for call in spec.parse(text)):
        raise UserError(f"mix={text!r}: cutmix has no target in a regression, where a box of an image has no number of "
                        "its own; use mixup, or no mixing")  # fmt: skip
    ops = [kinds.bind(call, MIXES, "mixing op", _GIVEN) for call in spec.parse(text)]
    if not ops:
        return None
    given = [op.keywords.get("probability") for op in ops]
    known = [p for p in given if p is not None]
    if not all(isinstance(p, int | float) and 0 <= p <= 1 for p in known) or (total := sum(known)) > 1 + 1e-6:
        raise UserError(f"mix={text!r}: each probability is a number from 0 to 1, all together at most 1")
    rest = (1 - total) / max(1, given.count(None))
    limits = np.cumsum([rest if p is None else p for p in given], dtype=np.float32)
    branches = [_with_key(op) for op in ops]
    if None not in given and total < 1 - 1e-6:
        branches.append(_unmixed)

    def mix(key: jax.Array, images: jax.Array) -> Mixed:
        key_choice, key_op = jax.random.split(key)
        if len(branches) == 1:
            return branches[0](key_op, images)
        choice = jnp.sum(jax.random.uniform(key_choice) >= limits[: len(branches) - 1], dtype=jnp.int32)
        return jax.lax.switch(choice, branches, key_op, images)

    return mix


def _with_key(op: Callable[..., Mixed]) -> Mix:
    return op if kinds.kind_of(op) == kinds.RANDOM else lambda key, images: op(images)


def _unmixed(key: jax.Array, images: jax.Array) -> Mixed:
    return images, jnp.ones(images.shape[0], jnp.float32)


def mixed_loss(loss: Loss, logits: jax.Array, labels: jax.Array, others: jax.Array, weight: jax.Array) -> jax.Array:
    """weight * loss(logits, own label) + (1 - weight) * loss(logits, the other's label), f32[b].

    If a loss is linear in the target, as cross-entropy is, this equals the loss against the mixed target.
    """
    return weight * loss(logits, labels) + (1 - weight) * loss(logits, others)


def batch_loss(loss: Loss, logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The loss f32[b] of logits for a batch with "target" f32[b, k], or "label" i32[b].

    If the images of a batch with labels are mixed, it has "other" and "weight" too; targets are mixed already.
    """
    if "target" in batch:
        return loss(logits, batch["target"])
    if "other" in batch:
        return mixed_loss(loss, logits, batch["label"], batch["other"], batch["weight"])
    return loss(logits, batch["label"])


def mixed_batch(batch: Mapping[str, jax.Array], images: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """The batch with mixed `images` and what the loss wants: the mixed "target", or "label", "other" and "weight"."""
    if "target" in batch:
        return {**batch, "image": images, "target": mixed_targets(batch["target"], weight)}
    return {**batch, "image": images, "other": partner(batch["label"]), "weight": weight}


def mix_batch(mix: Mix | None, key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch with "image" f32[b, h, w, c] and its labels or targets mixed by `mix`; the same batch for None."""
    return dict(batch) if mix is None else mixed_batch(batch, *mix(key, batch["image"]))


def mixed_targets(targets: jax.Array, weight: jax.Array) -> jax.Array:
    """f32[b, k]: weight * target + (1 - weight) * the other's target."""
    own = weight[:, None]
    return own * targets + (1 - own) * partner(targets)


def main_labels(labels: jax.Array, weight: jax.Array) -> jax.Array:
    """The own label or the other's, whichever has the greater weight: training accuracy counts this one."""
    return jnp.where(weight >= 0.5, labels, partner(labels))
