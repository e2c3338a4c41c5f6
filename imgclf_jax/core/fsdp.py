"""Fully sharded data parallelism (FSDP): all-gathers each sharded parameter at each of its uses.

This is ZeRO stage 3 (Rajbhandari et al. 2019, arXiv:1910.02054). A function of parameters is traced, after
differentiation if it is a gradient, and its jaxpr evaluated again with three changes:

- Each use of a sharded parameter all-gathers it anew, so no gathered array lives from the forward to the backward
  pass. Cheap functions of parameters alone, such as a cast or a transpose, are recomputed with it; a cast to fewer
  bytes comes before the gather.
- An `optimization_barrier` orders a gather after the activations that the previous use reads. At most two gathered
  arrays are alive, and the transfer of one overlaps the use of the other.
- The same barrier orders it after the reduce-scatter of gradients that were complete by then. Otherwise XLA combines
  the reductions of all gradients into one, and holds them until the last is complete.

Results differ only by the order of sums over devices.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var
from jax.sharding import NamedSharding, PartitionSpec

from imgclf_jax.core.jaxprs import INLINED, Atom, aval_of, bind, inner, named
from imgclf_jax.core.typing import Function, Params, PyTree

type Shardings = Callable[[PyTree], PyTree]  # a pytree of arrays → a pytree of NamedSharding
type Gathered = dict[Hashable, Any]  # the arrays of one use: shards by index, and what was computed from them
_FIXED = 3  # the index of `fixed` among the arguments after `params`: (model_state, batch, key, fixed)

_EXPENSIVE = frozenset({"dot_general", "conv_general_dilated", "sort", "fft", "cholesky", "qr", "svd", "eigh",
                        "triangular_solve", "householder_product", "lu"})  # fmt: skip


def gather_at_use(
    function: Function, shardings: Shardings, returns_gradients: bool = False, fixed_shardings: Shardings | None = None,
) -> Function:  # fmt: skip
    """Wraps `function(params, model_state, batch, *rest)` to all-gather sharded parameters at each use.

    - `shardings(params)` returns a pytree of NamedSharding like `params`; replicated parameters do not change.
    - `returns_gradients`: the function returns (…, gradients), a pytree like `params`, and they get its shardings.
    - `fixed_shardings(fixed)`: the shardings of a fifth argument, a method's `fixed` arrays, gathered in the same way.

    Call it after differentiation.
    """

    @functools.wraps(function)
    def gathered(params: Params, *args: PyTree) -> PyTree:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(params, *args)
        own = _sharded(shardings(params))
        fixed = _sharded([(fixed_shardings or shardings)(x) for x in args[_FIXED:]])
        first = len(closed.jaxpr.outvars) - len(own)
        gradients = {first + i: s for i, s in enumerate(own) if s is not None} if returns_gradients else {}

        def evaluate(evaluation: "_Evaluation", params: Params, *args: PyTree) -> list[jax.Array]:
            shards = jax.tree.leaves((params, args[_FIXED:]))
            parameters = evaluation.parameters(shards, [*own, *fixed])
            known = [_Known(x, number == 1) for number, arg in enumerate(args[:_FIXED]) for x in jax.tree.leaves(arg)]
            operands = [*parameters[: len(own)], *known, *parameters[len(own) :]]
            return [evaluation.force(x) for x in evaluation.run(closed, operands, gradients)]

        order: list[frozenset[int]] = []  # the parameters of each use, from a first evaluation of shapes only
        jax.eval_shape(functools.partial(evaluate, _Evaluation(order, dry=True)), params, *args)
        return jax.tree.unflatten(jax.tree.structure(shape), evaluate(_Evaluation(order), params, *args))

    return gathered


def _sharded(shardings: PyTree) -> list[NamedSharding | None]:
    """The sharding of each leaf; None for a replicated one."""
    return [None if s.is_fully_replicated else s for s in jax.tree.leaves(shardings)]


class _Known:
    """An array of the program, which barriers replace; `of_batch` if it depends on the batch."""

    def __init__(self, array: jax.Array, of_batch: bool = False):
        self.array, self.of_batch = array, of_batch


class _Deferred:
    """A function of the parameters `needs` alone, recomputed at each use.

    `compute(gathered)` returns its array; `gathered` caches the arrays of this use, including the parameters' shards.
    """

    def __init__(self, needs: frozenset[int], compute: Callable[[Gathered], jax.Array]):
        self.needs, self.compute = needs, compute


class _Parameter(_Deferred):
    """A sharded parameter, or its cast to `dtype`."""

    def __init__(self, number: int, sharding: NamedSharding, dtype: np.dtype):
        super().__init__(frozenset({number}), self.gather)
        self.number, self.sharding, self.dtype = number, sharding, dtype

    def gather(self, gathered: Gathered) -> jax.Array:
        key = (self.number, self.dtype)
        if key not in gathered:
            shard = lax.with_sharding_constraint(gathered[self.number].astype(self.dtype), self.sharding)
            gathered[key] = lax.with_sharding_constraint(shard, NamedSharding(self.sharding.mesh, PartitionSpec()))
        return gathered[key]


type Operand = _Known | _Deferred


class _Evaluation:
    """One evaluation of a jaxpr and those inside it, in order."""

    def __init__(self, order: list[frozenset[int]], dry: bool = False):
        self.order, self.dry = order, dry
        self.uses = 0  # so far
        self.shards: list[jax.Array] = []
        self.ordered: Gathered = {}  # the shards of the next use, ordered after the activations of the last
        self.complete: tuple[list[_Known], list[_Known]] = [], []  # gradients before the last use, and after it

    def parameters(self, shards: Sequence[jax.Array], shardings: Sequence[NamedSharding | None]) -> list[Operand]:
        """The parameters as values of the program."""
        self.shards = list(shards)
        return [_Known(x) if sharding is None else _Parameter(i, sharding, x.dtype)
                for i, (x, sharding) in enumerate(zip(shards, shardings, strict=True))]  # fmt: skip

    def run(
        self, closed: ClosedJaxpr, operands: Sequence[Operand], gradients_at: dict[int, NamedSharding]
    ) -> list[Operand]:
        """The results of a closed jaxpr. `gradients_at` has the shardings of those that are gradients, by index."""
        jaxpr = closed.jaxpr
        values: dict[Var, Operand] = dict(zip(jaxpr.constvars, map(_Known, closed.consts), strict=True))
        values.update(zip(jaxpr.invars, operands, strict=True))
        gradients = {v: s for i, s in gradients_at.items() if not isinstance(v := jaxpr.outvars[i], Literal)}

        def read(atom: Atom) -> Operand:
            return _Known(atom.val) if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            with equation.ctx.manager, named(equation):
                results = self.apply(equation, [read(atom) for atom in equation.invars], gradients)
                values.update(zip(equation.outvars, results, strict=True))
                for variable in gradients.keys() & set(equation.outvars):
                    value = values[variable]
                    if isinstance(value, _Known) and not any(value in complete for complete in self.complete):
                        value.array = lax.with_sharding_constraint(value.array, gradients[variable])
                        self.complete[1].append(value)
        return [read(atom) for atom in jaxpr.outvars]

    def apply(self, equation: JaxprEqn, operands: list[Operand], gradients: dict[Var, NamedSharding]) -> list[Operand]:
        """The results of one equation."""
        primitive = equation.primitive
        if primitive.name in INLINED:
            gradients_at = {i: gradients[v] for i, v in enumerate(equation.outvars) if v in gradients}
            return self.run(equation.params[INLINED[primitive.name]], operands, gradients_at)
        needs = frozenset().union(*(x.needs for x in operands if isinstance(x, _Deferred)))
        known = [x for x in operands if isinstance(x, _Known)]
        of_batch = any(x.of_batch for x in known)
        if needs and not of_batch and _is_cheap(equation):
            return _deferred(equation, operands, needs)
        gathered = self.use(needs, [x for x in known if x.of_batch and np.ndim(x.array)]) if needs else {}
        arrays = [x.array if isinstance(x, _Known) else x.compute(gathered) for x in operands]
        return [_Known(x, of_batch) for x in bind(equation, arrays)]

    def use(self, needs: frozenset[int], activations: Sequence[_Known] = ()) -> Gathered:
        """The shards of the parameters that a use needs. Orders those of the next use after its activations."""
        if self.dry:
            self.order.append(needs)
        shards: Gathered = {i: lax.optimization_barrier(self.shards[i]) for i in needs - self.ordered.keys()}
        shards |= {i: self.ordered[i] for i in needs & self.ordered.keys()}
        self.uses += 1
        self.ordered = {}
        if activations and self.uses < len(self.order):
            before = [max(activations, key=lambda x: np.size(x.array)), *self.complete[0]]
            following = {i: self.shards[i] for i in self.order[self.uses]}
            self.ordered, arrays = lax.optimization_barrier((following, [x.array for x in before]))
            for x, array in zip(before, arrays, strict=True):  # XLA drops a barrier's unused results
                x.array = array
            self.complete = self.complete[1], []
        return shards

    def force(self, x: Operand) -> jax.Array:
        """The array of a value, computed if it is deferred."""
        return x.array if isinstance(x, _Known) else x.compute(self.use(x.needs))


def _deferred(equation: JaxprEqn, operands: Sequence[Operand], needs: frozenset[int]) -> list[Operand]:
    """The deferred results of an equation."""
    if equation.primitive.name == "convert_element_type" and type(operands[0]) is _Parameter:
        x, dtype = operands[0], aval_of(equation.outvars[0]).dtype
        if dtype.itemsize < x.dtype.itemsize:
            return [_Parameter(x.number, x.sharding, dtype)]
    key = object()

    def compute(index: int, gathered: Gathered) -> jax.Array:
        if key not in gathered:
            arrays = [x.array if isinstance(x, _Known) else x.compute(gathered) for x in operands]
            gathered[key] = bind(equation, arrays)
        return gathered[key][index]

    return [_Deferred(needs, functools.partial(compute, i)) for i in range(len(equation.outvars))]


def _is_cheap(equation: JaxprEqn) -> bool:
    """Whether an equation only moves or maps elements, so it is recomputed instead of its result kept."""
    return equation.primitive.name not in _EXPENSIVE and not equation.effects and not inner(equation)
