"""Swappable parts of a backbone: blocks, normalizations and activations chosen in the model's spec.

A linen class declares such fields in a class attribute `swappable`; each value is then a spec of its own, such as
`resnet_cifar(block='my_nets:SEBlock(ratio=8)', norm='group_norm(num_groups=8)')`. In Python, pass the class::

    class MyNet(nn.Module):
        norm: ModuleDef = BatchNorm
        swappable = {"norm": NORM}

Parts may have swappable parts themselves. The backbone passes arguments such as `features` and `dtype` to the fields
that a part declares, unless the part's spec sets them.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen as nn

from imgclf_jax.core import spec
from imgclf_jax.core.errors import Untrusted, UserError
from imgclf_jax.core.typing import ModuleDef
from imgclf_jax.models.layers import gelu
from imgclf_jax.models.norms import BatchNorm, GroupNorm, LayerNorm


@dataclass(frozen=True)
class Part:
    """The choices for one swappable field, and the arguments that the backbone passes to the chosen class.

    `names` maps the names of built-in choices to classes. The arguments `passed` go to the fields of those names, where
    a class declares them; it must declare the `required` ones. With `function`, choices are functions of an array, with
    further arguments of their own, instead of classes.
    """

    names: Mapping[str, object]
    passed: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    function: bool = False


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
NORM = Part(NORMS, ("dtype", "momentum", "epsilon", "use_scale", "scale_init"))
ACTIVATION = Part(ACTIVATIONS, function=True)


def bind(call: spec.Call, part: Part, kind: str) -> functools.partial[Any]:
    """The class or function that `call` names, with its arguments bound and the specs among them resolved.

    `kind` is the field's name, for messages. Raises UserError for a name, an argument or a class that does not fit.
    """
    if part.function:
        function = spec.bind(call, part.names, kind, leading=("x",))
        if inspect.isclass(function.func):
            raise UserError(f"{kind} {call.name!r} is a class; {kind} must be a function of an array, such as 'gelu'")
        return function
    made = spec.bind(call, part.names, kind, by_name=part.passed)
    if part.passed:
        _check_class(made.func, part, kind, call.name)
    swappable: Mapping[str, Part] = getattr(made.func, "swappable", {})
    if not swappable or not all(isinstance(value, Part) for value in swappable.values()):
        return made
    settings = inspect.signature(made.func).bind_partial(*made.args, **made.keywords).arguments
    for key in swappable.keys() & settings.keys():
        text = settings[key]
        try:
            if not isinstance(text, str):
                example = next(iter(swappable[key].names))
                raise UserError(f"{key}={text!r} is not a spec; quote it, as in {key}='{example}'")
            inner = bind(spec.parse_one(text), swappable[key], key)
            settings[key] = inner if inner.args or inner.keywords else inner.func
        except Untrusted:
            raise
        except UserError as e:
            raise UserError(f"{kind}={str(call)!r}: {e}") from e
    return functools.partial(made.func, **settings)


def has_swapped(module: nn.Module) -> bool:
    """Whether a part of the module is not the default, so that published weights no longer fit."""
    fields = type(module).__dataclass_fields__
    return any(getattr(module, key) != fields[key].default for key in getattr(type(module), "swappable", {}))


def _check_class(made: object, part: Part, kind: str, name: str) -> None:
    if not (inspect.isclass(made) and issubclass(made, nn.Module)):
        raise UserError(f"{kind} {name!r} is not a subclass of flax.linen.Module")
    missing = [key for key in part.required if key not in made.__dataclass_fields__]
    if missing:
        raise UserError(
            f"{kind} {name!r} has no field {missing[0]!r}; this backbone needs {' and '.join(part.required)} in a "
            f"{kind}, and passes {', '.join(part.passed)} to fields of these names"
        )


def make(part: ModuleDef, name: str | None = None, **passed: object) -> Any:
    """Instantiates a module class, or a partial of one, with those of `passed` that are unbound fields of it."""
    bound = part.keywords if isinstance(part, functools.partial) else {}
    fields = inspect.signature(part.func if isinstance(part, functools.partial) else part).parameters
    return part(**{k: v for k, v in passed.items() if k in fields and k not in bound}, name=name)


def call(module: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    """Calls a module in training or evaluation mode: passes `train`, linen's `use_running_average`, or neither."""
    takes = inspect.signature(type(module).__call__).parameters
    if "train" in takes:
        return module(x, train)
    more = {"use_running_average": not train} if "use_running_average" in takes else {}
    return module(x, **more)


@dataclass(frozen=True)
class Norm:
    """Makes the normalization layers of a network, called as `norm(name)(x, train)` whatever their class accepts."""

    cls: ModuleDef  # a class, or a partial of one
    passed: Mapping[str, object] = field(default_factory=dict)

    def __call__(self, name: str | None = None, scale: float = 1.0) -> Callable[..., jax.Array]:
        """Returns a layer (x, train) -> x whose scale parameter is initialized to `scale`."""
        passed = self.passed if scale == 1 else {**self.passed, "scale_init": nn.initializers.constant(scale)}
        module = make(self.cls, name, **passed)

        def normalize(x: jax.Array, train: bool = False) -> jax.Array:
            return call(module, x, train)

        return normalize


def norms(norm: ModuleDef, **passed: object) -> Norm:
    """Wraps a class, or a partial of one, in a Norm; returns a Norm unchanged."""
    return norm if isinstance(norm, Norm) else Norm(norm, passed)
