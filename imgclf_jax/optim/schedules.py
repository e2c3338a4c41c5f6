"""Learning-rate schedules: functions from the step i32[] to the learning rate f32[].

`warmup` prepends a linear warmup. It and the boundaries of `step` are durations ('5%', '2 epochs', '500 steps').
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError

Steps = Callable[[str], int]  # converts a duration to whole steps


def constant(steps: Steps, total: int, peak: float, warmup: str = "") -> optax.Schedule:
    """A constant learning rate `peak`."""
    return _warm_up(optax.constant_schedule(float(peak)), peak, steps(warmup), total)


def cosine(steps: Steps, total: int, peak: float, warmup: str = "", end: float = 0.0) -> optax.Schedule:
    """Cosine decay from `peak` to `end` (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""
    return _warm_up(_half_cosine(peak, end, total - steps(warmup)), peak, steps(warmup), total)


def linear(steps: Steps, total: int, peak: float, warmup: str = "", end: float = 0.0) -> optax.Schedule:
    """Linear decay from `peak` to `end`."""
    return _warm_up(optax.linear_schedule(peak, end, max(1, total - steps(warmup))), peak, steps(warmup), total)


def one_cycle(
    steps: Steps, total: int, peak: float, warmup: str = "30%", start: float = 0.04, end: float = 1e-4
) -> optax.Schedule:
    """Cosine up from `start * peak` over `warmup`, then cosine down to `end * peak`.

    fastai's form of the one-cycle policy (Smith and Topin 2017, arXiv:1708.07120, who use straight lines). PyTorch's
    `OneCycleLR` also starts at 0.04 by default, reaches its peak a step earlier, and ends at 4e-6 of it.
    """
    up = _check_warmup(steps(warmup), total)
    rise, fall = _half_cosine(start * peak, peak, up), _half_cosine(peak, end * peak, total - up)
    return optax.join_schedules([rise, fall], [up])


def triangle(
    steps: Steps, total: int, peak: float, warmup: str = "25%", start: float = 0.0, end: float = 0.0
) -> optax.Schedule:
    """Linear up from `start * peak` over `warmup`, then linear down to `end * peak`."""
    up = _check_warmup(steps(warmup), total)
    rise = optax.linear_schedule(start * peak, peak, max(1, up))
    return optax.join_schedules([rise, optax.linear_schedule(peak, end * peak, max(1, total - up))], [up])


def step(
    steps: Steps, total: int, peak: float, at: tuple[str, ...] = ("50%", "75%"), factor: float = 0.1, warmup: str = ""
) -> optax.Schedule:
    """Step decay: `peak`, multiplied by `factor` at each duration in `at`, counted from step 0, warmup included."""
    at = (at,) if isinstance(at, str) else at
    offset = steps(warmup)
    after_warmup = [steps(t) - offset for t in at]
    boundaries = {n: factor ** after_warmup.count(n) for n in after_warmup}  # durations may round to the same step
    if any(n <= 0 for n in after_warmup):
        raise UserError(f"schedule step: every duration in at={at} must lie after warmup={warmup!r}")
    return _warm_up(optax.piecewise_constant_schedule(peak, boundaries), peak, offset, total)


def _half_cosine(first: float, last: float, length: int) -> optax.Schedule:
    decay = optax.cosine_decay_schedule(1.0, max(1, length))  # 1 to 0
    return lambda count: last + (first - last) * decay(count)


def _check_warmup(warmup: int, total: int) -> int:
    if warmup > total:
        raise UserError(f"schedule: a warmup of {warmup} steps is longer than the run of {total} steps; shorten it")
    return warmup


def _warm_up(schedule: optax.Schedule, peak: float, warmup: int, total: int) -> optax.Schedule:
    if _check_warmup(warmup, total) == 0:
        return schedule
    # Starts at peak / warmup, not 0, and reaches `peak` at step `warmup - 1`.
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, schedule], [warmup])


SCHEDULES = {f.__name__: f for f in (constant, cosine, linear, one_cycle, step, triangle)}


def build(text: str, steps: Steps, total: int) -> optax.Schedule:
    """Builds a schedule of `total` steps from a spec such as `cosine(1e-3, warmup='5%')`.

    `steps` converts a duration to whole steps; it raises UserError for text that is no duration.
    """
    schedule: optax.Schedule = bind(text)(steps, total)
    with jax.numpy_dtype_promotion("standard"):
        rate: Any = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), "int32")) if callable(schedule) else schedule
    if getattr(rate, "shape", None) != ():
        raise UserError(f"schedule={text!r} gives {rate!r:.80}; return a function of the step i32[] to a rate f32[]")
    return schedule


def bind(text: str) -> functools.partial[Any]:
    """The function (steps, total) → schedule of a spec; UserError for a wrong one, before durations are known."""
    return spec.bind(spec.parse_one(text), SCHEDULES, "schedule", leading=("steps", "total"))
