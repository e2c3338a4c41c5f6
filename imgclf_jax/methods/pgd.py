"""Projected gradient descent: adversarial examples in an L∞ ball, for training and for evaluation."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from imgclf_jax.core import platform, rng
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods.gradients import Gradient, GradientFunction

# (gradient, images f32[b, h, w, c], keys [b], low, high, …) → f32[b, h, w, c], see `attack`
Attack = Callable[..., jax.Array]


def pgd(
    gradient: Gradient,
    eps: float | str = "8/255",
    steps: int = 7,
    step_size: float | str | None = None,
    random_start: bool = True,
) -> GradientFunction:
    """Adversarial training: the gradient at the examples that `attack` makes of the batch (Madry et al. 2018).

    The arguments are those of `attack`. It ascends the training loss, mixed labels and label smoothing included, as the
    train step computes it: with the batch's own statistics and the step's dropout masks. The authors' program does so
    too, but there the passes of the attack also update the running statistics; here the last pass alone does. The loss
    and the metrics of the step are those of the adversarial examples. A step costs `steps` more gradients.
    """
    radius, size = _sizes("gradient", eps, steps, step_size)
    low, high = gradient.pixel_range()

    def adversarial(params: Any, model_state: Any, batch: Any, key: jax.Array) -> Any:
        def of_images(images: jax.Array) -> jax.Array:
            return gradient.images(params, model_state, {**batch, "image": images}, key)

        keys = jax.random.split(rng.fold(key, "pgd"), len(batch["image"]))
        images = _ascend(of_images, batch["image"], keys, low, high, radius, steps, size, random_start)
        return gradient(params, model_state, {**batch, "image": images}, key)

    return adversarial


def attack(
    gradient: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    keys: jax.Array,
    low: jax.Array,
    high: jax.Array,
    eps: float | str = "8/255",
    steps: int = 10,
    step_size: float | str | None = None,
    random_start: bool = True,
) -> jax.Array:
    """Adversarial examples f32[b, h, w, c] by ascent along the sign of the gradient (Madry et al. 2018).

    Section 2.1 of arXiv:1706.06083: from a uniformly random point of the L∞ ball of radius `eps` around each image,
    `steps` times a step of `step_size` along the sign, each followed by a projection onto the ball and onto the range
    of pixels. Lengths are numbers or fractions such as '8/255', in units in which pixels are 0 to 1. Without a
    `step_size` it is 2.5 eps / steps, with which every point of the ball can be reached. One step of the size `eps`
    without a random start is FGSM.

    `gradient(images)` is that of the loss to ascend, `keys` [b] are the examples', and `low` and `high` f32[1, 1, 1, c]
    are the values in `images` of pixels of 0 and 1. A pixel outside of these is moved no farther out.
    """
    radius, size = _sizes("--attack", eps, steps, step_size)
    return _ascend(gradient, images, keys, low, high, radius, steps, size, random_start)


def _ascend(
    gradient: Callable[[jax.Array], jax.Array], images: jax.Array, keys: jax.Array, low: jax.Array, high: jax.Array,
    radius: float, steps: int, size: float, random_start: bool,
) -> jax.Array:  # fmt: skip
    unit = high - low  # of a pixel, in `images`
    least = jnp.maximum(images - radius * unit, jnp.minimum(images, low))
    most = jnp.minimum(images + radius * unit, jnp.maximum(images, high))

    def ascend(_: Any, x: jax.Array) -> jax.Array:
        return jnp.clip(x + size * unit * jnp.sign(gradient(x)), least, most)

    start = images
    if random_start:
        draw = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:], images.dtype, -1, 1))
        start = jnp.clip(images + radius * unit * draw(keys), least, most)
    slow = platform.slow_in_loops(jax.make_jaxpr(gradient)(images), platform.current())
    return jax.lax.fori_loop(0, steps, ascend, start, unroll=True if slow else None)


def _sizes(where: str, eps: Any, steps: Any, step_size: Any) -> tuple[float, float]:
    """(eps, step_size) as numbers. Raises UserError, which begins with `where`, for what is none or out of range."""
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"{where}: pgd(steps={steps!r}): must be a whole number of 1 or more")
    radius = _length(where, "eps", eps)
    return radius, 2.5 * radius / steps if step_size is None else _length(where, "step_size", step_size)


def _length(where: str, name: str, value: Any) -> float:
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*/\s*(\d+)\s*", value) if isinstance(value, str) else None
    number = float(found[1]) / int(found[2]) if found and int(found[2]) else value
    if not isinstance(number, int | float) or not 0 < number <= 1:
        raise UserError(f"{where}: pgd({name}={value!r}): must be above 0 and at most 1, the whole range of a pixel; "
                        "write a number or a fraction such as '8/255'")  # fmt: skip
    return number
