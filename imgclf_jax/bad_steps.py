"""What a step does if its loss or gradient is not finite, or the loss spikes: the keys `on_bad_step` and `spike`.

Everything here is a pure function of the train state, so a resumed run skips the same steps as one that was never
stopped. `train/loop.py` rolls back, and `run/skipped.py` records.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import struct

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError

RECENT = 64  # skipped steps that the state remembers between two log lines; more of them end the run
_SPIKE = re.compile(r"\s*(\d+(?:\.\d+)?) sigma over (\d+)\s*")
_LEAST_SIGMA = 0.01  # of the mean loss: a loss that hardly varies has no spikes of a few per mille


class Guard(struct.PyTreeNode):
    """The part of a train state that knows which losses are usual, and which steps were skipped."""

    mean: jax.Array  # f32[], the exponential moving average of the losses of good steps
    variance: jax.Array  # f32[], theirs
    good: jax.Array  # i32[], good steps
    skipped: jax.Array  # i32[], steps that changed nothing
    steps: jax.Array  # i32[RECENT], the latest skipped steps as a ring buffer; -1 where there are none
    losses: jax.Array  # f32[RECENT], the losses of those that spiked; NaN for nonfinite steps


@dataclass(frozen=True)
class Policy:
    """What to do about a bad step: one whose loss, gradient norm or parameter norm is not finite, or that spikes.

    A loss spikes if it exceeds the moving average by `sigma` standard deviations; both are exponential, over `window`
    good steps, and nothing spikes before so many. Without `sigma` only nonfinite steps are bad.
    """

    action: str = "stop"  # "skip": the step changes nothing; "rollback": the `steps` up to the bad one are left out
    steps: int = 0
    sigma: float | None = None
    window: int = 0

    @property
    def guarded(self) -> bool:
        """Whether the train state has a `Guard`."""
        return self.action != "stop" or self.sigma is not None

    def init(self) -> Guard | None:
        """The guard of a run that begins; None if the policy needs none."""
        if not self.guarded:
            return None
        zero, none = jnp.int32(0), jnp.full(RECENT, -1, jnp.int32)
        return Guard(jnp.float32(0), jnp.float32(0), zero, zero, none, jnp.zeros(RECENT, jnp.float32))

    def is_spike(self, guard: Guard, loss: jax.Array) -> jax.Array:
        """bool[]: whether a finite loss spikes."""
        if self.sigma is None:
            return jnp.bool_(False)
        sigma = jnp.maximum(jnp.sqrt(guard.variance), _LEAST_SIGMA * jnp.abs(guard.mean))
        return (guard.good >= self.window) & (loss > guard.mean + self.sigma * sigma)

    def updated(self, guard: Guard, step: jax.Array, loss: jax.Array, bad: jax.Array) -> Guard:
        """The guard after a step. A bad step is skipped or ends the run, so its loss is not averaged.

        The moving variance is West's (1979), with the weight 1 / window, or 1 / n in the first steps.
        """
        weight = 1.0 / jnp.minimum(guard.good + 1, self.window or 1).astype(jnp.float32)
        difference = loss - guard.mean
        usual = guard.replace(
            mean=guard.mean + weight * difference,
            variance=(1 - weight) * (guard.variance + weight * difference**2),
            good=guard.good + 1,
        )
        place = guard.skipped % RECENT
        skipping = guard.replace(
            skipped=guard.skipped + 1,
            steps=guard.steps.at[place].set(step),
            losses=guard.losses.at[place].set(loss),
        )
        return optax.tree.where(bad, skipping, usual)


STOP = Policy()


def _rollback(steps: int = 200) -> Policy:
    return Policy("rollback", steps)


_ACTIONS = {"stop": lambda: STOP, "skip": lambda: Policy("skip"), "rollback": _rollback}


def build(action: str, spike: str) -> Policy:
    """The policy of the keys `on_bad_step` and `spike`. Raises UserError for a text that names none."""
    calls = spec.parse(action)
    if len(calls) != 1 or calls[0].name not in _ACTIONS:
        raise UserError(f"on_bad_step={action!r}: allowed is one of stop, skip and rollback(steps=200)")
    policy: Policy = spec.bind(calls[0], _ACTIONS, "on_bad_step")()
    if policy.action == "rollback" and not (type(policy.steps) is int and policy.steps > 0):
        raise UserError(f"on_bad_step={action!r}: steps must be a whole number of 1 or more")
    if not spike.strip():
        return policy
    match = _SPIKE.fullmatch(spike)
    if not match or not float(match[1]) > 0 or not 1 < int(match[2]) < 10**6:
        raise UserError(f"spike={spike!r}: write '6 sigma over 128', standard deviations above the moving average of "
                        "the losses of so many steps (2 or more); empty: only nonfinite steps are bad")  # fmt: skip
    return Policy(policy.action, policy.steps, float(match[1]), int(match[2]))
