"""The normalization and activation of a backbone, chosen in its spec.

`resnet_cifar(norm='group_norm(num_groups=8)', activation='my_file:swish')` works for each linen class whose attribute
`swappable` names these fields. In Python, pass the class and the function themselves::

    class MyNet(nn.Module):
        norm: ModuleDef = BatchNorm
        swappable = ("norm",)

        @nn.compact
        def __call__(self, x, train=False):
            norm = parts.norms(self.norm, momentum=0.9, dtype=x.dtype)
            return norm("bn")(x, train)
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen as nn

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import ModuleDef
from imgclf_jax.models.layers import gelu
from imgclf_jax.models.norms import BatchNorm, GroupNorm, LayerNorm

NORMS = {"batch_norm": BatchNorm, "group_norm": GroupNorm, "layer_norm": LayerNorm}
ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": gelu,
    "silu": nn.silu,
    "elu": nn.elu,
    "leaky_relu": nn.leaky_relu,
    "softplus": nn.softplus,
    "tanh": nn.tanh,
    "identity": lambda x: x,
}
_OF_BATCH_NORM = ("momentum", "epsilon", "use_scale")  # for norms that have such fields
_PASSED = ("dtype", "scale_init", *_OF_BATCH_NORM)


def bind(call: spec.Call, backbones: Mapping[str, object]) -> functools.partial[Any]:
    """The backbone that `call` names, with its arguments bound and its `norm` and `activation` resolved.

    Raises UserError for a name or an argument that does not fit.
    """
    made = spec.bind(call, backbones, "model")
    settings = inspect.signature(made.func).bind_partial(*made.args, **made.keywords).arguments
    swappable = [key for key in getattr(made.func, "swappable", ()) if key in settings]
    for key in swappable:
        inner = spec.parse_one(str(settings[key]))
        if key == "norm":
            part = spec.bind(inner, NORMS, key, by_name=_PASSED)
        else:
            part = spec.bind(inner, ACTIVATIONS, key, leading=("x",))
        settings[key] = part if part.args or part.keywords else part.func
    return functools.partial(made.func, **settings) if swappable else made


def has_swapped(module: nn.Module) -> bool:
    """Whether a part of the module is not the default, so that published weights no longer fit."""
    fields = type(module).__dataclass_fields__
    return any(getattr(module, key) != fields[key].default for key in ("block", "norm", "activation") if key in fields)


@dataclass(frozen=True)
class Norm:
    """Makes the normalization layers of a network, called as `norm(name)(x, train)` whatever their class accepts."""

    cls: ModuleDef  # a class, or a partial of one
    passed: Mapping[str, object] = field(default_factory=dict)

    def __call__(self, name: str | None = None, scale: float = 1.0) -> Callable[..., jax.Array]:
        """Returns a layer (x, train) -> x whose scale parameter is initialized to `scale`.

        It passes `train`, linen's `use_running_average`, or neither. Raises UserError if the class lacks a field that
        the network sets; `momentum`, `epsilon` and `use_scale` are for classes that have them.
        """
        passed = dict(self.passed) if scale == 1 else {**self.passed, "scale_init": nn.initializers.constant(scale)}
        fields, bound = inspect.signature(self.cls).parameters, getattr(self.cls, "keywords", {})
        if missing := [key for key in passed if key not in (*fields, *_OF_BATCH_NORM)]:
            raise UserError(f"norm {self.cls} has no field {missing[0]!r}, which this network sets")
        module = self.cls(**{k: v for k, v in passed.items() if k in fields and k not in bound}, name=name)
        takes = inspect.signature(type(module).__call__).parameters

        def normalize(x: jax.Array, train: bool = False) -> jax.Array:
            if "train" in takes:
                return module(x, train)
            return module(x, use_running_average=not train) if "use_running_average" in takes else module(x)

        return normalize


def norms(norm: ModuleDef, **passed: object) -> Norm:
    """Wraps a class, or a partial of one, in a Norm; returns a Norm unchanged."""
    return norm if isinstance(norm, Norm) else Norm(norm, passed)
