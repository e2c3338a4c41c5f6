"""The types that signatures name. Importing them imports no JAX.

Arrays are `jax.Array` or `np.ndarray`, dtypes `jax.typing.DTypeLike`. Whatever holds arrays by name, or in nested
containers, has one of these names, which say more than a type checker can check.
"""

from collections.abc import Callable, Mapping
from typing import Any

type Array = Any  # a jax.Array in a step, an np.ndarray on the host
type PyTree = Any  # nested containers whose leaves are arrays, or what stands for them: shapes, shardings
type Params = Any  # a pytree of arrays: nested dicts, as linen's "params" collection
type ModelState = Any  # every other linen collection by name, such as {"batch_stats": …}
type Variables = Mapping[str, Any]  # linen's collections by name: {"params": …, "batch_stats": …}
type OptState = Any  # the state of an optax optimizer
type Batch = dict[str, Any]  # arrays by name; a further stream is a dict of arrays
# As a source reads them: "image" uint8[n, h, w, c] or a list, "label" i32[n] or "target" f32[n, k].
type Examples = dict[str, Any]
type Function = Callable[..., Any]  # any function, for what wraps or traces it
type Arguments = dict[str, Any]  # keyword arguments by name
type Initializer = Callable[..., Any]  # (key, shape, dtype) → a parameter's initial value
type ModuleDef = Callable[..., Any]  # makes a linen module: its class, or a partial of it
type Value = Any  # of a config key or a spec's argument: a number, a text, a bool, None, or a tuple of them
type Json = Any  # a JSON value
type JsonObject = dict[str, Any]
type JsonMapping = Mapping[str, Any]  # a JSON object that is only read
