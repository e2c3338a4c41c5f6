"""A backbone and its head."""

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.models import parts
from imgclf_jax.models.backbones import BACKBONES

# Of a model of unknown origin. ResNet-1202 calls 3,000 modules; 4,000 are traced in some ten seconds.
_MOST_CALLS = 4_000
_MOST_PARAMETERS = 2**30
_MOST_BYTES_OF_A_BATCH = 2**30  # of all seeds together

# How the head's kernel [d, num_classes] may begin; its bias begins at zero.
HEAD_INITS: dict[str, Callable[..., Any]] = {
    "glorot_uniform": nn.initializers.glorot_uniform,
    "normal": nn.initializers.normal,
    "pytorch_linear": lambda: nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # ± 1 / sqrt(d)
    "zeros": lambda: nn.initializers.zeros,
}


class Classifier(nn.Module):
    """Images f32[b, h, w, c] to logits [b, num_classes]: the backbone's features [b, d] and one dense layer, the head.

    The backbone computes in its own dtype; the head in `dtype`, float32 unless told otherwise.
    """

    backbone: nn.Module
    num_classes: int
    dtype: Any = jnp.float32
    head_init: Callable[..., Any] = nn.initializers.glorot_uniform()

    def setup(self) -> None:
        self.head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=self.head_init)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        logits: jax.Array = self.head(self.features(images, train))
        return logits

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The backbone's features [b, d]."""
        features: jax.Array = self.backbone(images, train=train)
        return features


def build(text: str, num_classes: int, precision: str) -> Classifier:
    """The Classifier over the backbone that a spec such as `cnn(widths=(32, 64))` names.

    A backbone is a linen or an nnx module. One with a `dtype` field (nnx: a parameter of its constructor) gets
    `precision` ("float32" or "bfloat16"), unless the spec says its own. Every spec may have the argument `head_init`,
    which is no argument of the backbone: the text of one of HEAD_INITS, such as 'zeros' or 'normal(0.01)'. Raises
    UserError for any other, and for a width or another size below 1.
    """
    call = spec.parse_one(text)
    head_init = call.kwargs.get("head_init", "glorot_uniform")
    if not isinstance(head_init, str):
        raise UserError(f"model={text!r}: head_init={head_init!r} is not a text, such as 'zeros' or 'normal(0.01)'")
    make_init = spec.bind(spec.parse_one(head_init), HEAD_INITS, "head_init")
    own = {name: value for name, value in call.kwargs.items() if name != "head_init"}
    backbone = _backbone(spec.Call(call.name, call.args, own), text, jnp.dtype(precision))
    return Classifier(backbone, num_classes, head_init=make_init())


def _backbone(call: spec.Call, text: str, dtype: Any) -> nn.Module:
    if _is_nnx(made := spec.lookup(call, BACKBONES, "model")):
        from imgclf_jax.models.from_nnx import constructor

        named = spec.Call(made.__name__, call.args, call.kwargs)
        make = spec.bind(named, {named.name: constructor(made)}, "model")
        fields: Collection[str] = inspect.signature(make.func).parameters
    else:
        make = parts.bind(call, parts.Part(BACKBONES), "model")
        fields = getattr(make.func, "__dataclass_fields__", ())
    if call.name in BACKBONES:
        _check_sizes(text, make)
    settings = {"dtype": dtype} if "dtype" in fields and "dtype" not in make.keywords else {}
    backbone: nn.Module = make(**settings)
    return backbone


def _is_nnx(made: Any) -> TypeGuard[type[Any]]:
    """Whether a spec names an nnx module. Its file has imported `flax.nnx`, which takes a second."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and inspect.isclass(made) and issubclass(made, nnx.Module)


def _check_sizes(text: str, make: functools.partial[Any]) -> None:
    """Raises UserError unless the integers that a built-in backbone is given, as widths or a patch, are 1 or more."""
    given = inspect.signature(make.func).bind(*make.args, **make.keywords).arguments
    for name, value in given.items():
        if make.func.__dataclass_fields__[name].type not in (int, tuple[int, ...]):  # type: ignore[attr-defined]
            continue
        if any(isinstance(size, int) and size < 1 for size in (value if isinstance(value, tuple | list) else [value])):
            raise UserError(f"model={text!r}: {name}={value!r} must be 1 or more")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Inside, initializing a model raises UserError if it calls too many modules. See `spec.untrusted`."""
    calls = 0

    def counted(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal calls
        calls += 1
        spec.check_bound(calls, _MOST_CALLS, "calls of modules in its model")
        return call(*args, **kwargs)

    with nn.intercept_methods(counted):
        yield


def check_size(parameters: Iterable[tuple[int, ...]], batch: tuple[int, ...]) -> None:
    """Raises UserError for parameters of these shapes, or a batch of images uint8[b, h, w, c], that are too large."""
    spec.check_bound(sum(map(math.prod, parameters)), _MOST_PARAMETERS, "parameters")
    spec.check_bound(math.prod(batch), _MOST_BYTES_OF_A_BATCH, "bytes of images in a batch")
