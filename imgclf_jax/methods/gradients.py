"""The gradient function of a train step, its transforms (config key `gradient`), and gradient accumulation.

A transform is called as `transform(gradient, **arguments)` while the train step is traced, and returns a function with
the signature of `gradient`. `"sam(rho=0.05)|my_gradients:noisy(0.1)"` means noisy(sam(gradient)). `table.GRADIENTS`
lists the built-in ones.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from imgclf_jax.core import platform, rng, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Batch, ModelState, Params

type LossAndGrads = tuple[tuple[jax.Array, Any], Params]  # ((loss f32[], aux), grads); transforms pass `aux` through
type GradientFunction = Callable[[Params, ModelState, Batch, jax.Array], LossAndGrads]


@dataclass(frozen=True)
class Gradient:
    """The gradient of the mean loss of a batch: `gradient(params, model_state, batch, key) -> ((loss, aux), grads)`.

    `batch` comes from `Method.inputs`: by default "image" f32[b, h, w, c], augmented, mixed and normalized (pixels from
    0 to 1 with a plain `normalize`), and "label" i32[b]. `key` is for dropout. Microbatches, sharded parameters and
    sown losses are handled inside.

    - `images(params, model_state, batch, key)` f32[b, h, w, c] is the gradient of the summed example losses with
      respect to batch["image"].
    - `pixel_range()` returns the smallest and largest pixel value in batch["image"], f32[1, 1, 1, c] each. It raises
      UserError if the key `augment` has no fixed scale. It is None in a step that was built without one.
    """

    function: GradientFunction
    images: Callable[..., jax.Array]
    pixel_range: Any = None

    def __call__(self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndGrads:
        return self.function(params, model_state, batch, key)


def transform(gradient: Gradient, function: Callable[[Gradient], GradientFunction], name: str, count: int) -> Gradient:
    """`gradient` transformed by `function`, whose key is its own: by its name and the `count` of earlier ones of it."""
    own = function(gradient)
    if ":" not in name and not count:  # the built-in ones draw from a stream with their name
        return dataclasses.replace(gradient, function=own)

    def keyed(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndGrads:
        return own(params, model_state, batch, rng.fold(key, name, count))

    return dataclasses.replace(gradient, function=keyed)


def clip_per_example(gradient: Gradient, max_norm: float = 1.0) -> GradientFunction:
    """The mean of the examples' gradients, each scaled to a norm of at most `max_norm`, over all parameters.

    The clipping of DP-SGD (Abadi et al. 2016, arXiv:1607.00133, algorithm 1), without its noise. Each example has its
    own key, and so its own dropout mask; the loss, the metrics and the new model state are those of the whole batch.
    It holds the gradients of all examples at once. Raises UserError for a `max_norm` of 0 or less, for a model with
    batch statistics, which depend on other examples, for batches with arrays of another length, and with `accumulate`.
    """
    if not max_norm > 0:
        raise UserError(f"gradient: clip_per_example(max_norm={max_norm}): must be above 0")

    def clipped(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndGrads:
        if "batch_stats" in model_state:
            raise UserError("gradient: clip_per_example needs a model without batch statistics: norm='group_norm'")
        b = len(batch["image"])
        shapes = {name: jnp.shape(x) for name, x in tree.named_leaves(batch)}
        if wrong := [f"{name!r} has the shape {list(shape)}" for name, shape in shapes.items() if shape[:1] != (b,)]:
            raise UserError(f"gradient: clip_per_example needs arrays of one entry per example; {wrong[0]}")
        out, _ = gradient(params, model_state, batch, key)  # XLA drops this gradient
        singles = jax.tree.map(lambda x: x[:, None], batch), jax.random.split(rng.fold(key, "clip_per_example"), b)
        each = jax.vmap(lambda one, key: gradient(params, model_state, one, key)[1])(*singles)  # [b, …]
        scale = jnp.minimum(1, max_norm / jax.vmap(optax.tree.norm)(each))  # [b]; 1 for a zero gradient
        return out, jax.tree.map(lambda g: jnp.tensordot(scale.astype(g.dtype), g, 1) / b, each)

    return clipped


def check_examples(batch: Batch, given: Batch, parts: int) -> None:
    """Raises UserError for an array of `batch`, made of the batch `given`, that microbatches cannot share by example.

    Its first axis must have the length of `given` or of a stream of `data.extra` in it, or a multiple (several views).
    """
    lengths = [len(stream["image"]) for stream in (given, *given.values()) if isinstance(stream, dict)]
    for name, x in tree.named_leaves(batch):
        if not any(jnp.ndim(x) and len(x) and len(x) % n == 0 for n in lengths):
            raise UserError(f"accumulate={parts} splits the method's inputs by example, but {name!r} has the shape "
                            f"{list(jnp.shape(x))}; compute it in the method's loss, or set accumulate=1")  # fmt: skip


def _scan(function: Callable[..., Any], carry: Any, batch: Batch, key: jax.Array, parts: int) -> Any:
    """`lax.scan` of `function(carry, microbatch, key)`; microbatch i takes every `parts`-th example from i.

    So each has an equal share on every device. On CPU it is unrolled: a convolution in a loop is 100 times slower.
    """
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)  # [parts, b / parts, …]

    def one(carry: Any, part: tuple[jax.Array, Batch]) -> Any:
        return function(carry, part[1], jax.random.fold_in(key, part[0]))

    return jax.lax.scan(one, carry, (jnp.arange(parts), split), unroll=platform.current() == "cpu")


def accumulate(gradient: Gradient, parts: int) -> Gradient:
    """Computes a gradient and that of the images by microbatch.

    The gradient, which returns ((loss, (model_state, (logits, means))), grads), is averaged over `parts` of them.
    """
    join = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])  # [parts, b / parts, …] → [b, …]  # noqa: E731

    def mean_gradient(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndGrads:
        def add(carry: tuple[Params, ModelState], part: Batch, key: jax.Array) -> Any:
            total, model_state = carry
            (loss, (model_state, (logits, named))), grads = gradient(params, model_state, part, key)
            return (jax.tree.map(jnp.add, total, grads), model_state), (loss, logits, named)

        if (b := len(batch["image"])) % parts:
            raise UserError(f"accumulate={parts} does not divide the batch of {b} that gradient passes on; set "
                            "accumulate=1")  # fmt: skip
        carry = (jax.tree.map(jnp.zeros_like, params), model_state)
        (total, model_state), (losses, logits, named) = _scan(add, carry, batch, key, parts)
        logits = None if logits is None else join(logits)  # [b, classes]
        named = {name: jnp.mean(values) for name, values in named.items()}
        grads = jax.tree.map(lambda g: g / parts, total)
        return (jnp.mean(losses), (model_state, (logits, named))), grads

    def images(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> jax.Array:
        one = lambda _, part, key: (None, gradient.images(params, model_state, part, key))  # noqa: E731
        return join(_scan(one, None, batch, key, parts)[1])

    return Gradient(mean_gradient, images)
