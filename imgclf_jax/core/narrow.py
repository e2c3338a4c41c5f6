"""Weights kept in the dtype that a program reads them in.

A bfloat16 program reads most of its float32 weights cast to bfloat16. At batch 1 the casts take up to 40 % of the
time, so inference keeps the cast weights from call to call.
"""

import functools
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from imgclf_jax.core.jaxprs import INLINED, MATMULS, Atom, aval_of
from imgclf_jax.core.typing import Array, Function, ModelState, Params, PyTree

# Primitives that move values, those of each operand to the result in its place.
_MOVES = frozenset(
    "broadcast_in_dim copy copy_p optimization_barrier reshape rev slice squeeze stop_gradient transpose".split()  # noqa: SIM905
)

_WITH_BODY = {**INLINED, **dict.fromkeys(("scan", "checkpoint", "remat", "remat2"), "jaxpr")}  # of the same arguments


def accept_narrow(function: Function, shapes: PyTree) -> Function:
    """Wraps `function(params, model_state, *args)` to cast weights to the dtypes of `shapes` first.

    XLA omits these casts where the function casts back.
    """

    @functools.wraps(function)
    def cast(params: Params, model_state: ModelState, *args: PyTree) -> PyTree:
        weights = jax.tree.map(lambda x, like: x.astype(like.dtype), (params, model_state), shapes)
        return function(*weights, *args)

    return cast


def keep_narrowed(jitted: Any) -> Function:
    """Wraps a jitted `function(params, model_state, batch)` to pass the weights in the dtypes that it reads them in.

    The function must be wrapped by `accept_narrow`. Its results are the same, except that XLA no longer omits the
    rounding of a weight. The cast weights of the last call are kept as long as the originals live.
    """
    dtypes: dict[Any, tuple[np.dtype, ...]] = {}  # by the batch's shape and dtype
    lock = threading.Lock()
    last: tuple[tuple[np.dtype, ...], list[weakref.ref[jax.Array]], list[jax.Array]] | None = None

    def forget(_: object) -> None:
        nonlocal last
        last = None

    def cast(leaves: list[jax.Array], wanted: tuple[np.dtype, ...]) -> list[jax.Array]:
        nonlocal last
        with lock:
            known = last  # read once: `forget` may run at any time
            if known and known[0] == wanted and all(one() is x for one, x in zip(known[1], leaves, strict=True)):
                return known[2]
            changed = {i: dtype for i, (x, dtype) in enumerate(zip(leaves, wanted, strict=True)) if x.dtype != dtype}
            narrow = dict(zip(changed, _cast([leaves[i] for i in changed], tuple(changed.values())), strict=True))
            out = [narrow.get(i, x) for i, x in enumerate(leaves)]
            last = wanted, [weakref.ref(x, forget) for x in leaves], out
            return out

    def call(params: Params, model_state: ModelState, batch: Array) -> jax.Array:
        leaves, structure = jax.tree.flatten((params, model_state))
        key = structure, np.shape(batch), batch.dtype
        if key not in dtypes:
            read = read_dtypes(jitted.trace(params, model_state, batch).jaxpr)
            dtypes[key] = tuple(read[: len(leaves)])
        changes = any(x.dtype != dtype for x, dtype in zip(leaves, dtypes[key], strict=True))
        if changes and all(isinstance(x, jax.Array) for x in leaves):  # a NumPy array may change between calls
            params, model_state = jax.tree.unflatten(structure, cast(leaves, dtypes[key]))
        return jitted(params, model_state, batch)

    return call


@functools.partial(jax.jit, static_argnums=1)
def _cast(arrays: list[jax.Array], dtypes: tuple[np.dtype, ...]) -> list[jax.Array]:
    return [x.astype(dtype) for x, dtype in zip(arrays, dtypes, strict=True)]


def read_dtypes(closed: ClosedJaxpr) -> list[np.dtype]:
    """The dtype to keep each argument of a program in: narrower than its own if all that reads it are matmuls of that.

    XLA may omit the rounding of an element-wise operation's operand, so what these read is kept as it is.
    """
    reads = zip(closed.jaxpr.invars, _reads(closed.jaxpr), strict=True)
    return [_narrower(aval_of(x).dtype, *found) if len(found) == 1 else aval_of(x).dtype for x, found in reads]


def _narrower(own: np.dtype, read: np.dtype | None) -> np.dtype:
    floats = read is not None and jnp.issubdtype(own, jnp.floating) and jnp.issubdtype(read, jnp.floating)
    return read if read is not None and floats and read.itemsize < own.itemsize else own


def _reads(jaxpr: Jaxpr) -> list[set[np.dtype | None]]:
    """For each argument, the dtypes in which matmuls and convolutions read it, and None for any other reader."""
    found: dict[Atom, set[np.dtype | None]] = {x: set() for x in jaxpr.invars}
    origin: dict[Atom, Atom] = {x: x for x in jaxpr.invars}  # the argument that a variable is a moved or cast copy of

    def note(atoms: Iterable[Atom], reads: Iterable[set[np.dtype | None]]) -> None:
        for x, read in zip(atoms, reads, strict=True):
            if not isinstance(x, Literal) and x in origin:
                found[origin[x]] |= read

    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, equation.invars
        if name in _MOVES or (name == "convert_element_type" and _is_first_cast(equation, origin)):
            for x, y in zip(operands, equation.outvars, strict=True):
                if not isinstance(x, Literal) and x in origin:
                    origin[y] = origin[x]
        elif name in MATMULS:
            note(operands, [{aval_of(x).dtype} for x in operands])
        elif name in _WITH_BODY:
            body = equation.params[_WITH_BODY[name]]
            note(operands, _reads(getattr(body, "jaxpr", body)))
        elif function := getattr(equation.primitive, "function", None):
            shapes = [jax.ShapeDtypeStruct(aval_of(x).shape, aval_of(x).dtype) for x in operands]
            note(operands, _reads(jax.make_jaxpr(functools.partial(function, **equation.params))(*shapes).jaxpr))
        else:
            note(operands, [{None}] * len(operands))
    note(jaxpr.outvars, [{None}] * len(jaxpr.outvars))
    return list(found.values())


def _is_first_cast(equation: JaxprEqn, origin: Mapping[Atom, Atom]) -> bool:
    """Whether a cast is an argument's first and to floating point; two in a row may give other values than one."""
    x = equation.invars[0]
    first = isinstance(x, Literal) or x not in origin or aval_of(x).dtype == aval_of(origin[x]).dtype
    return first and jnp.issubdtype(equation.params["new_dtype"], jnp.floating)
