"""The Classifier, a backbone and a linear head, built from the config key `model`; models with frozen parameters."""

import inspect
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core import spec, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Arguments, Function, Initializer, PyTree, Variables
from imgclf_jax.models import parts
from imgclf_jax.models.backbones import BACKBONES

# Initializers of the head's kernel [d, num_classes]. Its bias starts at zero.
HEAD_INITS: dict[str, Function] = {
    "glorot_uniform": lambda: nn.initializers.glorot_uniform(),
    "normal": lambda stddev=0.01: nn.initializers.normal(stddev),
    "pytorch_linear": lambda: nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # ± 1 / sqrt(d)
    "zeros": lambda: nn.initializers.zeros,
}
# The arguments of a module's `__call__` that switch it between training and evaluation, as in evaluation.
_EVALUATION = {
    "train": False, "training": False, "deterministic": True, "use_running_average": True, "update_stats": False,
}  # fmt: skip


class Classifier(nn.Module):
    """A backbone and a linear head: images f32[b, h, w, c] → features [b, d] → logits [b, num_classes].

    The head computes in `dtype`, the backbone in its own; one with an attribute `applies_head` is called with the head,
    to return logits. A method calls the whole as `(images, train=…)`, or
    `features(images, train)`, `head(features)`, and what a subclass adds.
    """

    backbone: nn.Module
    num_classes: int
    dtype: DTypeLike = jnp.float32
    head_init: Initializer = nn.initializers.glorot_uniform()

    def setup(self) -> None:
        self.head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=self.head_init)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        if getattr(self.backbone, "applies_head", False) and not self.is_initializing():
            return cast(jax.Array, self.backbone(images, train=train, head=self.head))
        features = self.features(images, train)
        if self.is_initializing():
            self.init_more(features)
        return cast(jax.Array, self.head(features))

    def init_more(self, features: jax.Array) -> None:
        """Initializes further modules of a subclass, by calling them on features [b, d]; does nothing here."""

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The backbone's features [b, d]. Raises ValueError if it returns anything else."""
        features: jax.Array = self.backbone(images, train=train)
        b, shape = images.shape[0], getattr(features, "shape", None)
        if shape is None or len(shape) != 2 or (isinstance(b, int) and shape[0] != b):
            found = f"a {type(features).__name__}" if shape is None else list(shape)
            raise ValueError(f"the backbone returns {found}; it must return features [b, d], here [{b}, d], such as "
                             "the mean over the pixels of each image")  # fmt: skip
        return features


def build(text: str, num_classes: int, precision: str) -> Classifier:
    """Builds a Classifier from the spec of its backbone, such as `cnn(widths=(32, 64))`.

    A backbone is a linen module, or a function that makes one. If it takes `dtype`, it computes in
    `precision` ("float32" or "bfloat16") unless the spec sets `dtype`. Every spec accepts `head_init`, a spec of
    HEAD_INITS in quotes such as 'normal(0.01)', for the head. Raises UserError for an unknown backbone, for arguments
    that do not fit, and for a `dropout` or `drop_path` outside [0, 1).
    """
    call = spec.parse_one(text)
    kwargs = dict(call.kwargs)
    make_init = spec.bind(spec.parse_one(str(kwargs.pop("head_init", "glorot_uniform"))), HEAD_INITS, "head_init")
    for name in ("dropout", "drop_path"):
        if name in kwargs and not 0 <= kwargs[name] < 1:
            raise UserError(f"model={text!r}: {name}={kwargs[name]!r} must be a number from 0 to below 1")
    make = parts.bind(spec.Call(call.name, call.args, kwargs), BACKBONES)
    takes_dtype = "dtype" in inspect.signature(make.func).parameters and "dtype" not in make.keywords
    backbone = make(**{"dtype": jnp.dtype(precision)} if takes_dtype else {})
    if not isinstance(backbone, nn.Module):
        raise UserError(f"model={text!r} is a {type(backbone).__name__}, not a flax.linen.Module; for an nnx module, "
                        "name a function that wraps it by flax.nnx.bridge.ToLinen")  # fmt: skip
    takes = inspect.signature(type(backbone).__call__).parameters
    if "train" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise UserError(f"model={text!r}: __call__ takes ({', '.join(takes)}); add train, which is True in training")
    return Classifier(backbone, num_classes, head_init=make_init())


@dataclass(frozen=True)
class Frozen:
    """`model` with a stop-gradient on the parameters in `frozen`; `frozen` and `names` (all parameters) hold paths.

    A module whose parameters are all frozen runs in evaluation mode, with all modules in it: BatchNorm uses its running
    statistics without updating them, and dropout is off.
    """

    model: nn.Module
    frozen: frozenset[str]
    names: tuple[str, ...]

    def evaluate_frozen(
        self, call: Function, args: tuple[Any, ...], kwargs: Arguments, context: nn.module.InterceptorContext
    ) -> PyTree:
        """For `nn.intercept_methods`: calls a module, in evaluation mode if it is frozen."""
        module, parameters = context.module, inspect.signature(context.orig_method).parameters
        modes = {name: value for name, value in _EVALUATION.items() if name in parameters}
        if context.method_name != "__call__" or not modes or not self._is_frozen(module.path):
            return call(*args, **kwargs)
        bound = inspect.signature(context.orig_method).bind_partial(*args, **kwargs)
        for name, value in modes.items():
            if parameters[name].default is None and hasattr(module, name):
                # linen accepts it in the constructor or the call, not both, and refuses assignment to a bound module.
                object.__setattr__(module, name, None)
            bound.arguments[name] = value
        return call(*bound.args, **bound.kwargs)

    def _is_frozen(self, path: tuple[str, ...]) -> bool:
        """Whether the module at `path`, or one around it, has parameters, all of them frozen."""
        prefixes = ["".join(f"{part}/" for part in path[:i]) for i in range(len(path) + 1)]
        inside = [{name for name in self.names if name.startswith(prefix)} for prefix in prefixes]
        return any(own and own <= self.frozen for own in inside)


def apply_function(function: Function, model: nn.Module | Frozen, mutable: list[str]) -> Function:
    """`nn.apply(function, model, mutable)` for either kind of model.

    The result maps `(variables, *args, rngs=…)` to `(function(bound model, *args), changed variables)`.
    """
    if not isinstance(model, Frozen):
        return nn.apply(function, model, mutable)

    def apply(variables: Variables, *args: PyTree, **kwargs: object) -> PyTree:
        params = tree.map_named(
            lambda name, x: jax.lax.stop_gradient(x) if name in model.frozen else x, variables["params"]
        )
        with nn.intercept_methods(model.evaluate_frozen):
            return nn.apply(function, model.model, mutable)({**variables, "params": params}, *args, **kwargs)

    return apply
