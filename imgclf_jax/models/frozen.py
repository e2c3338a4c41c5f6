"""Models with frozen parameters."""

import inspect
from collections.abc import Sequence
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

    def apply_function(self, function: Function, mutable: list[str]) -> Function:
        """Returns what `nn.apply(function, model, mutable)` does, with the parameters frozen."""

        def stop(name: str, x: jax.Array) -> jax.Array:
            return jax.lax.stop_gradient(x) if name in self.frozen else x

        def apply(variables: Variables, *args: PyTree, **kwargs: object) -> PyTree:
            with nn.intercept_methods(self._evaluate_frozen):
                variables = {**variables, "params": tree.map_named(stop, variables["params"])}
                return nn.apply(function, self.model, mutable)(variables, *args, **kwargs)

        return apply

    def _evaluate_frozen(
        self, call: Function, args: tuple[Any, ...], kwargs: Arguments, context: nn.module.InterceptorContext
    ) -> PyTree:
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

    def _is_frozen(self, path: Sequence[str]) -> bool:
        """Whether the module at `path`, or one around it, has parameters, all of them frozen."""
        return any(self._has_only_frozen(path[:i]) for i in range(len(path) + 1))

    def _has_only_frozen(self, path: Sequence[str]) -> bool:
        prefix = "".join(f"{part}/" for part in path)
        own = [name for name in self.names if name.startswith(prefix)]
        return bool(own) and self.frozen.issuperset(own)


def apply_function(function: Function, model: nn.Module | Frozen, mutable: list[str]) -> Function:
    """`nn.apply(function, model, mutable)` for either kind of model.

    The result maps `(variables, *args, rngs=…)` to `(function(bound model, *args), changed variables)`.
    """
    if isinstance(model, Frozen):
        return model.apply_function(function, mutable)
    apply: Function = nn.apply(function, model, mutable)
    return apply
