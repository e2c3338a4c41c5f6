"""The normalization and activation of a backbone, chosen in its spec, and rematerialization of its blocks.

`resnet_cifar(norm='group_norm(num_groups=8)', activation='my_file:swish')` works for each linen class whose fields
`norm` and `activation` have a class and a function as defaults, or None. In Python, pass these themselves; see `norms`.
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
    **{f: getattr(nn, f) for f in ("relu", "relu6", "silu", "hard_silu", "elu", "leaky_relu", "softplus", "tanh")},
    "gelu": gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "identity": lambda x: x,
}
_OF_BATCH_NORM = ("momentum", "epsilon", "use_scale")  # for norms that have such fields
_PASSED = ("dtype", "scale_init", *_OF_BATCH_NORM)
_WITHOUT_EFFECT = {"axis_name", "axis_index_groups", "force_float32_reductions"}  # fields of linen's, in a train step


def bind(call: spec.Call, backbones: Mapping[str, object]) -> functools.partial[Any]:
    """The backbone that `call` names, with its arguments bound and its `norm` and `activation` resolved.

    Raises UserError for a name or an argument that does not fit.
    """
    made = spec.bind(call, backbones, "model")
    signature = inspect.signature(made.func)
    settings = signature.bind_partial(*made.args, **made.keywords).arguments
    if "block" in settings and made.func in backbones.values():
        raise UserError(f"model={str(call)!r}: a spec names no block; pass the class in Python, in a function of yours")
    for key, table, leading, by_name in (("norm", NORMS, (), _PASSED), ("activation", ACTIVATIONS, ("x",), ())):
        if key not in settings or not (callable(default := signature.parameters[key].default) or default is None):
            continue
        part = spec.bind(spec.parse_one(str(settings[key])), table, key, leading, by_name)
        if part.func in table.values() and (ignored := _WITHOUT_EFFECT & part.keywords.keys()):
            raise UserError(f"{key}={settings[key]!r}: {min(ignored)} has no effect here; leave it out")
        settings[key] = part if part.args or part.keywords else part.func
    return functools.partial(made.func, **settings)


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

        It passes `train`, linen's `use_running_average`, or neither. `momentum`, `epsilon` and `use_scale` are for
        classes that have them.
        """
        passed = self.passed if scale == 1 else {**self.passed, "scale_init": nn.initializers.constant(scale)}
        fields, bound = inspect.signature(self.cls).parameters, getattr(self.cls, "keywords", {})
        given = {k: v for k, v in passed.items() if k not in bound and (k in fields or k not in _OF_BATCH_NORM)}
        module = self.cls(**given, name=name)
        if scale != 1 and not getattr(module, "use_scale", True):
            raise UserError(f"norm: use_scale=False leaves no scale to start at {scale:g}; set zero_init=False")
        takes = inspect.signature(type(module).__call__).parameters

        def normalize(x: jax.Array, train: bool = False) -> jax.Array:
            modes = {"train": train, "use_running_average": not train}
            return module(x, **{key: value for key, value in modes.items() if key in takes})

        return normalize


def norms(norm: ModuleDef, **passed: object) -> Norm:
    """Wraps a class, or a partial of one, in a Norm that passes it `passed`; returns a Norm unchanged."""
    return norm if isinstance(norm, Norm) else Norm(norm, passed)


def block_of(network: Any, norm: Norm, block: ModuleDef | None = None, /, **passed: object) -> functools.partial[Any]:
    """The network's block, or another one, with its `norm`, `activation` and `dtype`, called as (x, train).

    With `remat` "block" the backward pass stores only x and recomputes the rest (Chen et al. 2016, arXiv:1604.06174);
    parameters and results are the same. Raises UserError for any other `remat` than "".
    """
    passed |= {"norm": norm, "activation": network.activation, "dtype": network.dtype}
    bound, kind = functools.partial(block or network.block, **passed), getattr(network, "remat", "")
    if kind not in ("", "block"):
        raise UserError(f"remat={kind!r}: allowed are '' (store all activations) and 'block' (store block inputs only)")
    if kind:
        bound = functools.partial(nn.remat(bound.func, static_argnums=(2,)), *bound.args, **bound.keywords)
    return bound
