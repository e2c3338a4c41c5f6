"""Refuses user code that is impure: tracing it a second time must give the same programs."""

import dataclasses

import jax

from imgclf_jax.core import jaxprs, processes, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import TRACED_KEYS

_again = jax.make_user_context(False)  # part of the key of JAX's tracing caches


def check(programs: Programs, fresh: bool) -> JsonObject:
    """The digest of a train step that user code is part of, as {"traced": …}; without user code it is {}.

    In a run that begins (`fresh`) everything is built and traced twice, and this raises UserError, naming the keys, if
    the programs differ: a number drawn or counted while tracing is a constant, and a resumed run would have another.
    What a process computes once, or reads from a file, only changes the digest.
    """
    config = programs.recipe.config
    own = [f"{key}={config[key]!r}" for key in TRACED_KEYS if spec.names_code(config[key])]
    if not own:
        return {}
    first = _digests(programs)
    if fresh:
        with _again(True):
            second = _digests(dataclasses.replace(programs, recipe=dataclasses.replace(programs.recipe)))
        if second != first:
            raise UserError(f"{' or '.join(own)} gives another program when it is traced again, since it draws from "
                            "np.random, counts its calls or keeps other state, so a resumed run would have other "
                            "numbers; draw from the keys and rng streams that it gets")  # fmt: skip
    processes.agree(lambda: {"the traced train step": first[0]})
    return {"traced": first[0]}


def _digests(programs: Programs) -> list[str]:
    return [jaxprs.digest(traced.jaxpr) for traced in (programs.traced_train, programs.traced_eval)]
