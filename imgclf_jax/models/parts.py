"""Parts of a backbone that its spec may name: blocks, normalizations, activations, …

A linen class lists such fields in a class attribute `swappable`; the value of each is then itself a spec, such as
`resnet_cifar(block='my_nets:SEBlock(ratio=8)', norm='group_norm(num_groups=8)')`. In Python, pass the class::

    class MyNet(nn.Module):
        norm: Any = BatchNorm
        swappable = {"norm": NORM}

A part's own class may have `swappable` too. What the backbone gives a part, such as `features` or `dtype`, goes to the
fields that the part's class declares, unless the part's spec sets them.
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
from imgclf_jax.models.layers import gelu
from imgclf_jax.models.norms import BatchNorm, GroupNorm, LayerNorm


@dataclass(frozen=True)
class Part:
    """What one field of a backbone may be: shipped classes by name, and what the backbone gives to the one chosen.

    `given` are the arguments passed by name to each class that has such a field; a class must have those in `required`.
    With `function` the part is a function of an array, with its own arguments behind.
    """

    names: Mapping[str, Any]
    given: tuple[str, ...] = ()
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
    """What `call` names, with its arguments bound, and the specs among them resolved.

    Raises UserError for a name, an argument, or a class that does not fit; `kind` is the field's name.
    """
    if part.function:
        function = spec.bind(call, part.names, kind, given=("x",))
        if inspect.isclass(function.func):
            raise UserError(f"{kind} {call.name!r} is a class; {kind} must be a function of an array, such as 'gelu'")
        return function
    made = spec.bind(call, part.names, kind, by_name=part.given)
    if part.given:
        _check_class(made.func, part, kind, call.name)
    own: Mapping[str, Part] = getattr(made.func, "swappable", {})
    if not own or not all(isinstance(value, Part) for value in own.values()):
        return made
    settings = inspect.signature(made.func).bind_partial(*made.args, **made.keywords).arguments
    for key in own.keys() & settings.keys():
        text = settings[key]
        try:
            if not isinstance(text, str):
                raise UserError(f"{key}={text!r} is not a spec; quote it, such as {key}='{next(iter(own[key].names))}'")
            part_made = bind(spec.parse_one(text), own[key], key)
            settings[key] = part_made if part_made.args or part_made.keywords else part_made.func
        except Untrusted:
            raise
        except UserError as e:
            raise UserError(f"{kind}={str(call)!r}: {e}") from e
    return functools.partial(made.func, **settings)


def are_swapped(module: nn.Module) -> bool:
    """Whether a part of the module is not the default: its weights are then of another network than the published."""
    fields = type(module).__dataclass_fields__
    return any(getattr(module, key) != fields[key].default for key in getattr(type(module), "swappable", {}))


def _check_class(made: Any, part: Part, kind: str, name: str) -> None:
    if not (inspect.isclass(made) and issubclass(made, nn.Module)):
        raise UserError(f"{kind} {name!r} is not a subclass of flax.linen.Module")
    missing = [key for key in part.required if key not in made.__dataclass_fields__]
    if missing:
        raise UserError(
            f"{kind} {name!r} has no field {missing[0]!r}; this backbone needs {' and '.join(part.required)} in a "
            f"{kind}, and passes {', '.join(part.given)} to fields of these names"
        )


def make(part: Any, name: str | None = None, **given: Any) -> Any:
    """The module of a class or of a partial of one; `given` sets the fields that it has and does not set itself."""
    return _with_given(part, given)(name=name)


def _with_given(part: Any, given: Mapping[str, Any]) -> functools.partial[Any]:
    bound = part.keywords if isinstance(part, functools.partial) else {}
    fields = inspect.signature(part.func if isinstance(part, functools.partial) else part).parameters
    return functools.partial(part, **{k: v for k, v in given.items() if k in fields and k not in bound})


def call(module: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    """`module(x, train)`, or as its `__call__` wants it: linen's `use_running_average`, or neither."""
    takes = inspect.signature(type(module).__call__).parameters
    if "train" in takes:
        return module(x, train)
    more = {"use_running_average": not train} if "use_running_average" in takes else {}
    return module(x, **more)


@dataclass(frozen=True)
class Norm:
    """Makes a network's normalizations, each called as `norm(name)(x, train)`, whatever its class wants to be told."""

    cls: Any  # a class, or a partial of one
    given: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, name: str | None = None, scale: float = 1.0) -> Callable[..., jax.Array]:
        """The function (x, train) → x; `scale` is its scale's initial value."""
        given = self.given if scale == 1 else {**self.given, "scale_init": nn.initializers.constant(scale)}
        module = make(self.cls, name, **given)

        def normalize(x: jax.Array, train: bool = False) -> jax.Array:
            return call(module, x, train)

        return normalize


def norms(norm: Any, **given: Any) -> Norm:
    """A Norm of a class or a partial of one; a Norm is returned as it is."""
    return norm if isinstance(norm, Norm) else Norm(norm, given)
