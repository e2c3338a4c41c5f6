"""Mixing: mixes each image with another one of its batch, and their targets or the losses of their labels alike.

A mixing op is `@kinds.random`: it takes `(key, images, …)` and returns (images, weight f32[b]). Image i is mixed with
image i - 1, the first with the last, and keeps the share `weight`. As the order of a batch is random, the neighbour is
a random example; only those of the first images of each device are on another device.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.augment import geometry
from imgclf_jax.core import kinds, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.losses import Loss

Mixed = tuple[jax.Array, jax.Array]  # images [b, h, w, c], weight f32[b] of their own labels
Mix = Callable[[jax.Array, jax.Array], Mixed]  # (key, images)


def partner(x: jax.Array) -> jax.Array:
    """The images or labels [b, …] that each example is mixed with: those of the one before it."""
    return jnp.roll(x, 1, axis=0)


def _draw_weights(name: str, key: jax.Array, alpha: float, count: int) -> jax.Array:
    """f32[count] ~ Beta(alpha, alpha)."""
    if alpha <= 0:
        raise UserError(f"{name}(alpha={alpha}): must be above 0")
    # A ratio of gamma variates, as in jax.random.beta, but with half its compile time.
    logs = jax.random.loggamma(key, alpha, (2, count))
    return jax.nn.sigmoid(logs[0] - logs[1])


@kinds.random
def mixup(
    key: jax.Array, images: jax.Array, alpha: float = 0.2, probability: float | None = None, per_batch: bool = False,
) -> Mixed:  # fmt: skip
    """weight * image + (1 - weight) * other, weight ~ Beta(alpha, alpha) (Zhang et al. 2017, arXiv:1710.09412).

    Each image draws its own weight, as the paper defines it; `per_batch` makes one draw a per batch, with the weight
    max(a, 1 - a), as in big_vision. `probability` is the share of batches that this op mixes: see `build`.
    """
    del probability
    weight = _draw_weights("mixup", key, alpha, 1 if per_batch else images.shape[0])
    if per_batch:
        weight = jnp.broadcast_to(jnp.maximum(weight, 1 - weight), images.shape[:1])
    own = weight.astype(images.dtype)[:, None, None, None]
    return own * images + (1 - own) * partner(images), weight


@kinds.random
def cutmix(key: jax.Array, images: jax.Array, alpha: float = 1.0, probability: float | None = None) -> Mixed:
    """Pastes a box of the other image (Yun et al. 2019, arXiv:1905.04899).

    The box's sides are sqrt(1 - a) of the image's, a ~ Beta(alpha, alpha). Its centre is uniform over the image, and
    the border clips it; the weight is the share of the area that remains. `probability` is as for mixup.
    """
    del probability
    b, h, w, _ = images.shape
    key_weight, key_y, key_x = jax.random.split(key, 3)
    side = jnp.sqrt(1 - _draw_weights("cutmix", key_weight, alpha, b))  # [b]

    def interval(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:  # i32[b] each
        half = (size * side).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (b,), 0, size)
        return jnp.maximum(centre - half, 0), jnp.minimum(centre + half, size)

    (top, bottom), (left, right) = interval(key_y, h), interval(key_x, w)
    pasted = ((bottom - top) * (right - left)).astype(jnp.float32)
    inside = geometry.in_box(h, w, top, left, bottom, right)
    return jnp.where(inside, partner(images), images), 1 - pasted / (h * w)


MIXES: dict[str, Callable[..., Mixed]] = {"mixup": mixup, "cutmix": cutmix}


def build(text: str) -> Mix | None:
    """Returns the function (key, images) → (images, weight) that a spec of mixing ops names; None for empty text.

    It draws one of the ops per batch. Ops without a `probability`, in the spec or as their default, share the rest
    equally; if all have one, other batches stay unmixed.
    """
    ops = [kinds.bind(call, MIXES, "mixing op", {kinds.RANDOM: ("key", "images")}) for call in spec.parse(text)]
    if not ops:
        return None
    arguments = [inspect.signature(op).parameters.get("probability") for op in ops]
    probabilities: list[Any] = [argument and argument.default for argument in arguments]  # given, the op's own, or None
    known = [p for p in probabilities if p is not None]
    if not all(isinstance(p, int | float) and 0 <= p <= 1 for p in known) or (total := sum(known)) > 1 + 1e-6:
        raise UserError(f"mix={text!r}: each probability must be from 0 to 1, and their sum at most 1")
    rest = (1 - total) / max(1, probabilities.count(None))
    limits = np.cumsum([rest if p is None else p for p in probabilities], dtype=np.float32)
    branches: list[Mix] = [*ops]
    if None not in probabilities and total < 1 - 1e-6:
        branches.append(lambda key, images: (images, jnp.ones(images.shape[0], jnp.float32)))

    def mix(key: jax.Array, images: jax.Array) -> Mixed:
        key_choice, key_op = jax.random.split(key)
        choice = jnp.sum(jax.random.uniform(key_choice) >= limits[: len(branches) - 1], dtype=jnp.int32)
        return jax.lax.switch(choice, branches, key_op, images)

    return mix


def batch_loss(loss: Loss, logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The loss f32[b] of logits against a batch's "target" f32[b, k], already mixed, or its "label" i32[b].

    A mixed batch with labels also has "other" and "weight". The weighted mean of the two losses is the loss against the
    mixed target if it is linear in the target, such as cross-entropy.
    """
    own = loss(logits, batch["target"] if "target" in batch else batch["label"])
    if "other" not in batch:
        return own
    return batch["weight"] * own + (1 - batch["weight"]) * loss(logits, batch["other"])


def mix_batch(mix: Mix | None, key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Mixes a batch's "image" f32[b, h, w, c] and its "target" by `mix`; None changes nothing.

    Without targets it adds "other" and "weight" to the "label", for the loss.
    """
    if mix is None:
        return dict(batch)
    images, weight = mix(key, batch["image"])
    if "target" not in batch:
        return {**batch, "image": images, "other": partner(batch["label"]), "weight": weight}
    own = weight[:, None]
    return {**batch, "image": images, "target": own * batch["target"] + (1 - own) * partner(batch["target"])}
