"""Models with frozen parameters."""

import inspect
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn

from imgclf_jax.core import tree
from imgclf_jax.core.typing import Arguments, Function, PyTree, Variables

# The arguments of a module's `__call__` that switch it between training and evaluation, as in evaluation.
_EVALUATION = {
    "train": False, "training": False, "deterministic": True, "use_running_average": True, "update_stats": False,
}  # fmt: skip


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
