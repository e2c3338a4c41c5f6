"""An `nnx.Module` as a backbone. Imported only for such a model, since `flax.nnx` takes a second to import."""

import functools
import inspect
from collections.abc import Callable

import jax
from flax import nnx
from flax.core import FrozenDict

from imgclf_jax.core.typing import Function


class FromNnx(nnx.bridge.ToLinen):
    """A linen module that constructs an nnx module and calls it, in training or in evaluation mode.

    Parameters lie in "params" and the statistics of `nnx.BatchNorm` in "batch_stats", by nnx's paths.
    """

    sorts_parameters = True  # by name, so that layers have no order

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:  # type: ignore[override]
        features: jax.Array = super().__call__(x, nnx_method=functools.partial(_call, train=train))
        return features


def _call(module: nnx.Module, x: jax.Array, train: bool) -> jax.Array:
    (module.train if train else module.eval)()  # whether Dropout draws, and which statistics BatchNorm takes
    call: Function = module
    return call(x, train=train) if "train" in inspect.signature(type(module).__call__).parameters else call(x)


def constructor(nnx_class: type[nnx.Module]) -> Callable[..., FromNnx]:
    """The function of the arguments of the class, without `rngs`, that returns the backbone."""
    signature = inspect.signature(nnx_class.__init__)  # nnx's metaclass hides it
    own = [p for name, p in signature.parameters.items() if name not in ("self", "rngs")]

    def make(*args: object, **kwargs: object) -> FromNnx:
        return FromNnx(nnx_class, args, FrozenDict(kwargs), "rngs" not in signature.parameters, metadata_fn=None)

    make.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return make
