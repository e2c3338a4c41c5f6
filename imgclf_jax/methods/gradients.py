"""The gradient function of a train step, its transforms (config key `gradient`), and gradient accumulation.

A transform is called as `transform(gradient, **arguments)` while the train step is traced, and returns a function with
the signature of `gradient`. `"sam(rho=0.05)|my_gradients:noisy(0.1)"` means noisy(sam(gradient)). `table.GRADIENTS`
lists the built-in ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from imgclf_jax.core import platform, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Arguments, Batch, ModelState, Params

# (params, model_state, batch, key) → ((loss f32[], aux), grads); transforms pass `aux` through.
type LossAndGrads = tuple[tuple[jax.Array, Any], Params]  # ((loss f32[], aux), grads)
type GradientFunction = Callable[[Params, ModelState, Batch, jax.Array], LossAndGrads]


def _no_pixel_range() -> tuple[jax.Array, jax.Array]:
    raise UserError("gradient: this train step does not know the pixel range of its images; pass pixel_range to "
                    "methods.table.build_gradient")  # fmt: skip


@dataclass(frozen=True)
class Gradient:
    """The gradient of the mean loss of a batch: `gradient(params, model_state, batch, key) -> ((loss, aux), grads)`.

    `batch` comes from `Method.inputs`; `key` is for dropout. Microbatches, sharded parameters and sown losses are
    handled inside.

    - `images(params, model_state, batch, key)` f32[b, h, w, c] is the gradient of the summed example losses with
      respect to batch["image"].
    - `pixel_range()` returns the smallest and largest pixel value in batch["image"], f32[1, 1, 1, c] each. It raises
      UserError if the key `augment` has no fixed scale.
    """

    function: GradientFunction
    images: Callable[..., jax.Array]
    pixel_range: Callable[[], tuple[jax.Array, jax.Array]] = _no_pixel_range

    def __call__(self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndGrads:
        return self.function(params, model_state, batch, key)

    def value(self, model_state: ModelState, batch: Batch, key: jax.Array) -> Callable[[Params], jax.Array]:
        """Returns the loss f32[] as a function of the parameters whose derivative is this gradient."""

        @jax.custom_vjp
        def value(params: Params) -> jax.Array:
            return self(params, model_state, batch, key)[0][0]

        def forward(params: Params) -> tuple[jax.Array, Params]:
            (loss, _), grads = self(params, model_state, batch, key)
            return loss, grads

        def backward(grads: Params, loss: jax.Array) -> tuple[Params]:
            return (jax.tree.map(lambda g: g * loss.astype(g.dtype), grads),)

        value.defvjp(forward, backward)

        def value_fn(params: Params, grad_fn: object = None, obj_fn: object = None) -> jax.Array:
            return value(params)  # optax's line searches pass all extra arguments

        return value_fn

    def extra_arguments(
        self, value: jax.Array, grads: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> Arguments:
        """optax's extra arguments of an update: `value`, `grad`, `value_fn` (Sophia's `obj_fn`) and `grad_fn`."""
        value_fn = self.value(model_state, batch, key)
        return {
            "value": value,
            "grad": grads,
            "value_fn": value_fn,
            "obj_fn": value_fn,
            "grad_fn": lambda params, *_: self(params, model_state, batch, key)[1],
        }


def check_examples(batch: Batch, given: Batch, parts: int) -> None:
    """Raises UserError for an array of `batch`, made of the batch `given`, that microbatches cannot share by example.

    Its first axis must have the length of `given` or of a stream of `data.extra` in it, or a multiple, such as two
    views of each example.
    """
    lengths = [len(stream["image"]) for stream in (given, *given.values()) if isinstance(stream, dict)]
    for name, x in tree.named_leaves(batch):
        if not any(jnp.ndim(x) and len(x) and len(x) % n == 0 for n in lengths):
            raise UserError(f"accumulate={parts} splits the method's inputs by example, but {name!r} has the shape "
                            f"{list(jnp.shape(x))}; compute it in the method's loss, or set accumulate=1")  # fmt: skip


def _split(batch: Batch, parts: int) -> Batch:
    """Splits [b, …] → [parts, b / parts, …]; microbatch i takes every `parts`-th example from i.

    So each microbatch has an equal share of the examples on every device.
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _join(x: jax.Array) -> jax.Array:
    """[parts, b / parts, …] → [b, …], the inverse of `_split`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _unroll() -> bool:
    return platform.current() == "cpu"  # XLA's CPU convolution is a hundred times slower inside a loop


def accumulate(gradient: GradientFunction, parts: int) -> GradientFunction:
    """Averages the gradient over `parts` microbatches: returns ((loss, (model_state, (logits, means))), grads)."""
    if parts == 1:
        return gradient

    def mean_gradient(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndGrads:
        def add(carry: tuple[Params, ModelState], part: tuple[jax.Array, Batch]) -> Any:
            total, model_state = carry
            out, grads = gradient(params, model_state, part[1], jax.random.fold_in(key, part[0]))
            loss, (model_state, (logits, named)) = out
            return (jax.tree.map(jnp.add, total, grads), model_state), (loss, logits, named)

        carry = (jax.tree.map(jnp.zeros_like, params), model_state)
        (total, model_state), (losses, logits, named) = jax.lax.scan(
            add, carry, (jnp.arange(parts), _split(batch, parts)), unroll=_unroll()
        )
        logits = None if logits is None else _join(logits)  # [b, classes]
        named = {name: jnp.mean(values) for name, values in named.items()}
        grads = jax.tree.map(lambda g: g / parts, total)
        return (jnp.mean(losses), (model_state, (logits, named))), grads

    return mean_gradient


def accumulate_images(gradient: Callable[..., jax.Array], parts: int) -> Callable[..., jax.Array]:
    """Computes the image gradient `gradient(params, model_state, batch, key)` f32[b, h, w, c] by microbatch."""
    if parts == 1:
        return gradient

    def gradients(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> jax.Array:
        def one(_: None, part: tuple[jax.Array, Batch]) -> tuple[None, jax.Array]:
            return None, gradient(params, model_state, part[1], jax.random.fold_in(key, part[0]))

        _, out = jax.lax.scan(one, None, (jnp.arange(parts), _split(batch, parts)), unroll=_unroll())
        return _join(out)

    return gradients
