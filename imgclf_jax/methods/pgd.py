"""Projected gradient descent (PGD): adversarial examples in an L∞ ball, for training and for evaluation."""

from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp

from imgclf_jax.core import platform, rng
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Batch, ModelState, Params
from imgclf_jax.methods.gradients import Gradient, GradientFunction, LossAndGrads

Attack = Callable[..., jax.Array]  # (gradient, images f32[b, h, w, c], keys [b], low, high, …) → images: see `attack`


def pgd(
    gradient: Gradient, eps: float | str = "8/255", steps: int = 7, step_size: float | str | None = None,
    random_start: bool = True,
) -> GradientFunction:  # fmt: skip
    """Adversarial training: the gradient at adversarial examples of the batch (Madry et al. 2018).

    The arguments are those of `attack`. It ascends the training loss, with mixed labels and label smoothing, as the
    train step computes it: with batch statistics and the step's dropout masks. Only the final pass updates the running
    statistics; in the authors' program the passes of the attack do so too. The step's loss and metrics are those of the
    adversarial examples. A step costs `steps` more gradients.
    """

    def adversarial(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndGrads:
        ascended = lambda images: gradient.images(params, model_state, {**batch, "image": images}, key)  # noqa: E731
        keys = jax.random.split(rng.fold(key, "pgd"), len(batch["image"]))
        low, high = gradient.pixel_range()
        images = attack(ascended, batch["image"], keys, low, high, eps, steps, step_size, random_start)
        return gradient(params, model_state, {**batch, "image": images}, key)

    return adversarial


def attack(
    gradient: Callable[[jax.Array], jax.Array], images: jax.Array, keys: jax.Array, low: jax.Array, high: jax.Array,
    eps: float | str = "8/255", steps: int = 10, step_size: float | str | None = None, random_start: bool = True,
) -> jax.Array:  # fmt: skip
    """Adversarial examples f32[b, h, w, c] by sign-gradient ascent (Madry et al. 2018, arXiv:1706.06083, section 2.1).

    Starts at a uniformly random point of the L∞ ball around each image, then takes `steps` steps along the sign of the
    gradient, each projected onto the ball and the pixel range. One step of size `eps` without a random start is FGSM.

    - `gradient(images)` is the gradient of the loss to ascend.
    - `keys` [b] are random keys, one per example.
    - `low` and `high` f32[1, 1, 1, c] are the values in `images` of pixels 0 and 1. Pixels outside move no farther out.
    - `eps`, the radius, and `step_size` are numbers or fractions such as '8/255', on a scale where pixels are 0 to 1.
      The default step size, 2.5 eps / steps, can reach every point of the ball.
    """
    radius = _length("eps", eps)
    size = 2.5 * radius / steps if step_size is None else _length("step_size", step_size)
    unit = high - low  # the pixel range 0 to 1 on the scale of `images`
    lower = jnp.maximum(images - radius * unit, jnp.minimum(images, low))
    upper = jnp.minimum(images + radius * unit, jnp.maximum(images, high))

    def ascend(_: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.clip(x + size * unit * jnp.sign(gradient(x)), lower, upper)

    if random_start:
        draw = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:], images.dtype, -1, 1))
        images = jnp.clip(images + radius * unit * draw(keys), lower, upper)
    # On CPU convolutions and their gradients take up to a hundred times as long in a loop.
    return jax.lax.fori_loop(0, steps, ascend, images, unroll=True if platform.current() == "cpu" else None)


def _length(name: str, value: float | str) -> float:
    try:
        number = float(Fraction(value))
    except (ValueError, ZeroDivisionError):
        number = 0.0
    if not 0 < number <= 1:
        raise UserError(f"pgd({name}={value!r}): must be above 0 and at most 1, the full range of a pixel; "
                        "write a number or a fraction such as '8/255'")  # fmt: skip
    return number
