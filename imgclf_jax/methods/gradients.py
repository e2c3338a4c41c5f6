"""Functions of the gradient function, composed by `|` in the config key `gradient`.

`"sam(rho=0.05)|my_gradients:noisy(0.1)"` gives noisy(sam(gradient)). Each is called once, outside of any trace, as
`function(gradient, **arguments)`, and returns a function of the same signature.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from imgclf_jax.core import spec

# (params, model_state, batch, key) → ((loss f32[], aux), grads); `aux` is handed on as it is.
GradientFunction = Callable[..., Any]


@dataclass(frozen=True)
class Gradient:
    """The gradient of the mean loss of a batch: `gradient(params, model_state, batch, key) -> ((loss, aux), grads)`.

    `batch` is what `Method.inputs` gave and `key` what dropout draws from. Microbatches, sharded parameters and sown
    losses are taken care of. `images(params, model_state, batch, key)` f32[b, h, w, c] is the gradient of the sum of
    the examples' losses with respect to batch["image"].
    """

    function: GradientFunction
    images: Callable[..., jax.Array]

    def __call__(self, params: Any, model_state: Any, batch: Any, key: jax.Array) -> Any:
        return self.function(params, model_state, batch, key)

    def value(self, model_state: Any, batch: Any, key: jax.Array) -> Callable[[Any], jax.Array]:
        """The loss f32[] as a differentiable function of the parameters, with this gradient as its derivative."""

        @jax.custom_vjp
        def value(params: Any) -> jax.Array:
            return self(params, model_state, batch, key)[0][0]

        def forward(params: Any) -> tuple[jax.Array, Any]:
            (loss, _), grads = self(params, model_state, batch, key)
            return loss, grads

        def backward(grads: Any, loss: jax.Array) -> tuple[Any]:
            return (jax.tree.map(lambda g: g * loss.astype(g.dtype), grads),)

        value.defvjp(forward, backward)
        return value


GRADIENTS: dict[str, Callable[..., GradientFunction]] = {}


def build(text: str) -> Callable[[Gradient], Gradient]:
    """The composed functions of a spec such as `sam(rho=0.05)`; the empty text leaves the gradient as it is.

    Raises UserError for a spec that names nothing, or whose arguments do not fit.
    """
    functions = [spec.bind(call, GRADIENTS, "gradient", given=("gradient",)) for call in spec.parse(text)]
    return lambda gradient: functools.reduce(lambda g, f: Gradient(f(g), g.images), functions, gradient)
