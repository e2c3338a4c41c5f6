"""SAM and ASAM: sharpness-aware minimization, with the gradient at the worst point of a neighborhood."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from imgclf_jax.core import tree
from imgclf_jax.core.typing import Batch, ModelState, Params
from imgclf_jax.methods.gradients import Gradient, GradientFunction, LossAndGrads

_WEIGHTS = ("kernel", "scale", "embedding")  # linen's names for PyTorch's `weight`


def sam(gradient: Gradient, rho: float = 0.05) -> GradientFunction:
    """Sharpness-aware minimization: the gradient at w + rho g / ‖g‖, where g is the gradient at w.

    Equation 2 and algorithm 1 of Foret et al. 2021 (arXiv:2010.01412). A step costs two gradients, on the same batch,
    dropout masks and model state; the loss, the metrics and the new state, such as batch statistics, come from w. The
    norm covers all parameters, and g is the gradient of the global batch: one perturbation for all microbatches and
    devices, where the authors' program has one per device.
    """
    return _at_worst_point(gradient, rho, lambda params, grads: grads)


def asam(gradient: Gradient, rho: float = 0.5, eta: float = 0.01) -> GradientFunction:
    """Adaptive SAM, whose neighborhood scales with each weight: the gradient at w + rho T² g / ‖T g‖.

    Algorithm 1 of Kwon et al. 2021 (arXiv:2102.11600). As in the authors' program, T is `|w| + eta` for weights (here
    parameters named `kernel`, `scale` or `embedding`) and 1 for the rest, such as biases. Otherwise like `sam`.
    """

    def scale(name: str, w: jax.Array, g: jax.Array) -> jax.Array:
        return (jnp.abs(w) + eta) * g if name.rpartition("/")[2] in _WEIGHTS else g

    return _at_worst_point(gradient, rho, functools.partial(tree.map_named, scale))


def _at_worst_point(gradient: Gradient, rho: float, scaled: Callable[[Params, Params], Params]) -> GradientFunction:
    """Returns the gradient at w + rho T² g / ‖T g‖; `scaled(w, x)` computes T x."""

    def sharp(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndGrads:
        out, grads = gradient(params, model_state, batch, key)
        once = scaled(params, grads)
        size = rho / jnp.maximum(optax.tree.norm(once), 1e-12)  # a zero gradient perturbs nothing
        worst = jax.tree.map(lambda w, d: w + size.astype(w.dtype) * d, params, scaled(params, once))
        return out, gradient(worst, model_state, batch, key)[1]

    return sharp
