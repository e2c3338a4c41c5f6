"""The kind of an op: which arguments it gets besides the images. A decorator declares it, such as `@kinds.random`.

An op without a decorator is plain: it takes only the images, or one image on the host, and is deterministic. Evaluation
applies plain ops, training the ops of all kinds. ::

    kind          device op                      mixing op        host op        view op
    plain         (images, …)                                     (image, …)     (…)
    random        (key, images, …)               (key, images, …) (rng, image, …)
    by_example    (key, images, ids, epochs, …)

A random device op gets a JAX key that differs at each step, a random host op a NumPy generator. The key of a by-example
op is the same at all steps, so the op can fold in the ids or epochs of its examples, i32[b].
"""

import functools
from collections.abc import Mapping
from typing import Any

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Function

PLAIN, RANDOM, BY_EXAMPLE = "plain", "random", "by_example"


def random[Op: Function](op: Op) -> Op:
    """Declares a random op: `(key, images, …)`, or `(rng, image, …)` on the host."""
    op.op_kind = RANDOM  # type: ignore[attr-defined]
    return op


def by_example[Op: Function](op: Op) -> Op:
    """Declares a device op that draws by example: `(key, images, ids, epochs, …)`, with one key for all steps."""
    op.op_kind = BY_EXAMPLE  # type: ignore[attr-defined]
    return op


def kind_of(op: Function) -> str:
    """The declared kind of an op, or of the function that it wraps or binds; PLAIN without a declaration."""
    return str(spec.declared(op, "op_kind", PLAIN))


def bind(
    call: spec.Call, table: spec.Table, family: str, leading: Mapping[str, tuple[str, ...]]
) -> functools.partial[Any]:
    """Binds the arguments of the op that a call names: see `spec.bind`.

    `family` names the ops, such as "device op"; `leading` has the leading arguments of each kind in the family. Raises
    UserError for an op of another kind.
    """
    op = spec.lookup(call, table, family)
    kind = kind_of(op)
    if kind == PLAIN and (spec.takes(op, "key") or spec.takes(op, "rng")):
        raise UserError(f"{family} {call.name!r} draws at random: declare it by @kinds.random")
    if kind not in leading:
        raise UserError(f"{family} {call.name!r} is @kinds.{kind}; allowed for a {family}: {', '.join(leading)}")
    return spec.bind(call, table, family, leading[kind])
