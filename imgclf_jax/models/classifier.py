"""The Classifier, a backbone and a linear head, built from the config key `model`."""

import functools
import inspect
import sys
from collections.abc import Collection
from typing import Any, TypeGuard, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Function, Initializer
from imgclf_jax.models import parts
from imgclf_jax.models.backbones import BACKBONES

# Initializers of the head's kernel [d, num_classes]. Its bias starts at zero.
HEAD_INITS: dict[str, Function] = {
    "glorot_uniform": nn.initializers.glorot_uniform,
    "normal": nn.initializers.normal,
    "pytorch_linear": lambda: nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # ± 1 / sqrt(d)
    "zeros": lambda: nn.initializers.zeros,
}


class Classifier(nn.Module):
    """A backbone and a linear head: images f32[b, h, w, c] → features [b, d] → logits [b, num_classes].

    The head computes in `dtype`, the backbone in its own.
    """

    backbone: nn.Module
    num_classes: int
    dtype: DTypeLike = jnp.float32
    head_init: Initializer = nn.initializers.glorot_uniform()

    def setup(self) -> None:
        self.head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=self.head_init)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        features = self.features(images, train)
        if self.is_initializing():
            self.init_more(features)
        logits: jax.Array = self.head(features)
        return logits

    def init_more(self, features: jax.Array) -> None:
        """Initializes further modules of a subclass, by calling them on features [b, d]; does nothing here."""

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The backbone's features [b, d]. Raises ValueError if it returns anything else."""
        features: Any = self.backbone(images, train=train)
        b, is_array = images.shape[0], hasattr(features, "shape")
        if not is_array or features.ndim != 2 or (isinstance(b, int) and features.shape[0] != b):
            found = f"{features.dtype}{list(features.shape)}" if is_array else f"a {type(features).__name__}"
            raise ValueError(f"the backbone returns {found}; it must return features [b, d], here [{b}, d], such as "
                             "the mean over the pixels of each image")  # fmt: skip
        return cast(jax.Array, features)


def build(text: str, num_classes: int, precision: str) -> Classifier:
    """Builds a Classifier from the spec of its backbone, such as `cnn(widths=(32, 64))`.

    A backbone is a linen or an nnx module, or a function that makes one. If it takes `dtype`, it computes in
    `precision` ("float32" or "bfloat16") unless the spec sets `dtype`. Every spec accepts `head_init`, a spec of
    HEAD_INITS in quotes such as 'zeros' or 'normal(0.01)'; the backbone does not see it. Raises UserError for an
    unknown backbone, for arguments that do not fit, and for sizes below 1.
    """
    call = spec.parse_one(text)
    head_init = call.kwargs.get("head_init", "glorot_uniform")
    if not isinstance(head_init, str):
        raise UserError(f"model={text!r}: head_init={head_init!r} must be in quotes, such as 'zeros' or 'normal(0.01)'")
    make_init = spec.bind(spec.parse_one(head_init), HEAD_INITS, "head_init")
    backbone_kwargs = {name: value for name, value in call.kwargs.items() if name != "head_init"}
    backbone = _build_backbone(spec.Call(call.name, call.args, backbone_kwargs), text, jnp.dtype(precision))
    return Classifier(backbone, num_classes, head_init=make_init())


def _build_backbone(call: spec.Call, text: str, dtype: DTypeLike) -> nn.Module:
    made = spec.lookup(call, BACKBONES, "model")
    if _is_nnx(made):
        from imgclf_jax.models.from_nnx import constructor

        named = spec.Call(made.__name__, call.args, call.kwargs)
        make = spec.bind(named, {named.name: constructor(made)}, "model")
        fields: Collection[str] = inspect.signature(make.func).parameters
    else:
        try:
            make = parts.bind(call, BACKBONES)
        except UserError as e:
            if inspect.isclass(made):
                raise
            raise UserError(f"{_no_module(call.name, made)}: {e}") from e
        fields = inspect.signature(make.func).parameters
    if call.name in BACKBONES:
        _check_values(text, make)
    settings = {"dtype": dtype} if "dtype" in fields and "dtype" not in make.keywords else {}
    backbone = make(**settings)
    if not isinstance(backbone, nn.Module):
        raise UserError(_no_module(call.name, made))
    return backbone


def _no_module(name: str, made: object) -> str:
    kind = f"a {type(made).__name__}" if not inspect.isclass(made) else "another class"
    return f"model {name!r} is {kind}; name a class, a flax.linen.Module or an nnx.Module"


def _is_nnx(made: object) -> TypeGuard[type[Any]]:
    """Whether `made` is an nnx module class. Looks up `flax.nnx` instead of importing it, which takes a second."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and inspect.isclass(made) and issubclass(made, nnx.Module)


def _check_values(text: str, make: functools.partial[Any]) -> None:
    """Raises UserError for arguments of a built-in backbone that are out of range.

    Integers, such as a width or the patch size, are 1 or more; `dropout` and `drop_path` are in [0, 1).
    """
    arguments = inspect.signature(make.func).bind(*make.args, **make.keywords).arguments
    for name, value in arguments.items():
        if name in ("dropout", "drop_path") and not (isinstance(value, int | float) and 0 <= value < 1):
            raise UserError(f"model={text!r}: {name}={value!r} must be a number from 0 to below 1")
        if make.func.__dataclass_fields__[name].type not in (int, tuple[int, ...]):  # type: ignore[attr-defined]
            continue
        if any(isinstance(size, int) and size < 1 for size in (value if isinstance(value, tuple | list) else [value])):
            raise UserError(f"model={text!r}: {name}={value!r} must be 1 or more")
