"""The kind of an op: what it is given beside the images. A function declares its kind by a decorator::

    from imgclf_jax.core import kinds

    @kinds.random
    def noise(key, images, strength=8):
        ...

An op without a decorator is plain: it takes the images alone, or one image on the host, and it draws nothing. Training
and evaluation apply plain ops. Training alone applies the ops of the other two kinds. ::

    kind          device op                      mixing op        host op        view op
    plain         (images, …)                    (images, …)      (image, …)     (…)
    random        (key, images, …)               (key, images, …) (rng, image, …)
    by_example    (key, images, ids, epochs, …)

A random op on the device gets a JAX key that differs at each step. A random host op gets a NumPy generator. The key of
an op by example is the same at all steps, so that the op can fold in the ids or the epochs of its examples, i32[b].
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError

PLAIN, RANDOM, BY_EXAMPLE = "plain", "random", "by_example"

# A first parameter of such a name holds no images. So a plain op that has one lacks its decorator.
_DRAWS = ("key", "keys", "rng", "rngs", "rng_key", "prng", "prng_key", "generator", "seed")


def random[Op: Callable[..., Any]](op: Op) -> Op:
    """Declares that an op draws at random: `(key, images, …)`, or `(rng, image, …)` on the host."""
    return _declare(op, RANDOM)


def by_example[Op: Callable[..., Any]](op: Op) -> Op:
    """Declares that a device op draws by example: `(key, images, ids, epochs, …)`, the key the same at all steps."""
    return _declare(op, BY_EXAMPLE)


def _declare[Op: Callable[..., Any]](op: Op, kind: str) -> Op:
    op.op_kind = kind  # type: ignore[attr-defined]
    return op


def kind_of(op: Callable[..., Any]) -> str:
    """The declared kind of an op, or of the function that it wraps or binds; PLAIN without a declaration."""
    if isinstance(op, functools.partial) and not hasattr(op, "op_kind"):
        return kind_of(op.func)
    return str(getattr(op, "op_kind", getattr(inspect.unwrap(op), "op_kind", PLAIN)))  # unwrap: as jax.jit wraps


def bind(
    call: spec.Call, table: spec.Table, family: str, given: Mapping[str, tuple[str, ...]]
) -> functools.partial[Any]:
    """The op that a call names, with the call's arguments bound: see `spec.bind`.

    `family` is what the ops are, such as "device op"; `given` says what each kind that the family has is given. Raises
    UserError for an op of another kind, and for a plain one that looks as if its decorator were missing.
    """
    op = spec.lookup(call, table, family)
    kind = kind_of(op)
    if kind not in given:
        raise UserError(f"{family} {call.name!r} is declared @kinds.{kind}; allowed for a {family}: {', '.join(given)}")
    first = next(iter(spec.parameters(op, call, family)), "")
    if kind == PLAIN and RANDOM in given and first in _DRAWS:
        raise UserError(
            f"{family} {call.name!r} takes {first!r} first, but it does not declare that it draws at random; write "
            f"'from imgclf_jax.core import kinds' and '@kinds.{_likely(first, given)}' above the function, or give "
            "the parameter another name"
        )
    return spec.bind(call, table, family, given[kind])


def _likely(first: str, given: Mapping[str, tuple[str, ...]]) -> str:
    return BY_EXAMPLE if first == "seed" and BY_EXAMPLE in given else RANDOM
