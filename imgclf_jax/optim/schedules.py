"""Learning-rate schedules: functions from the step, i32[], to the learning rate, f32[].

With a `warmup`, the rate first rises in a straight line. `warmup` and the boundaries of `step` are durations ('5%',
'2 epochs', '500 steps').
"""

from collections.abc import Callable

import optax

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError

Steps = Callable[[str], int]  # from a duration to whole steps


def constant(steps: Steps, total: int, peak: float, warmup: str = "") -> optax.Schedule:
    """The rate is `peak` at each step."""
    return _warm_up(optax.constant_schedule(float(peak)), peak, steps(warmup), total)


def cosine(steps: Steps, total: int, peak: float, warmup: str = "", end: float = 0.0) -> optax.Schedule:
    """Half a cosine from `peak` to `end` (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""
    return _warm_up(_half_cosine(peak, end, total - steps(warmup)), peak, steps(warmup), total)


def linear(steps: Steps, total: int, peak: float, warmup: str = "", end: float = 0.0) -> optax.Schedule:
    """A straight line from `peak` to `end`."""
    return _warm_up(optax.linear_schedule(peak, end, max(1, total - steps(warmup))), peak, steps(warmup), total)


def one_cycle(
    steps: Steps, total: int, peak: float, warmup: str = "30%", start: float = 0.04, end: float = 1e-4
) -> optax.Schedule:
    """Cosine up from `start * peak` over `warmup`, then cosine down to `end * peak`.

    The one-cycle policy of Smith and Topin 2017 (arXiv:1708.07120), whose lines are straight, in fastai's form. By
    default PyTorch's `OneCycleLR` starts at 0.04 too, reaches its peak a step earlier, and ends at 4e-6 of it.
    """
    up = steps(warmup)
    _check_warmup(up, total)
    rise, fall = _half_cosine(start * peak, peak, up), _half_cosine(peak, end * peak, total - up)
    return optax.join_schedules([rise, fall], [up])


def triangle(
    steps: Steps, total: int, peak: float, warmup: str = "25%", start: float = 0.0, end: float = 0.0
) -> optax.Schedule:
    """A straight line up from `start * peak` over `warmup`, and one down to `end * peak`."""
    up = steps(warmup)
    _check_warmup(up, total)
    rise = optax.linear_schedule(start * peak, peak, max(1, up))
    return optax.join_schedules([rise, optax.linear_schedule(peak, end * peak, max(1, total - up))], [up])


def step(
    steps: Steps, total: int, peak: float, at: tuple[str, ...] = ("50%", "75%"), factor: float = 0.1, warmup: str = ""
) -> optax.Schedule:
    """`peak`, multiplied by `factor` at each duration in `at` (counted from the first step, warmup included)."""
    at = (at,) if isinstance(at, str) else at
    offset = steps(warmup)
    places = [steps(t) - offset for t in at]
    boundaries = {p: factor ** places.count(p) for p in places}  # two durations may round up to the same step
    if any(p <= 0 for p in places):
        raise UserError(f"schedule step: every duration in at={at} must lie after warmup={warmup!r}")
    return _warm_up(optax.piecewise_constant_schedule(peak, boundaries), peak, offset, total)


def _half_cosine(first: float, last: float, length: int) -> optax.Schedule:
    share = optax.cosine_decay_schedule(1.0, max(1, length))  # of `first`: 1 to 0
    return lambda count: last + (first - last) * share(count)


def _check_warmup(warmup: int, total: int) -> None:
    if warmup > total:
        raise UserError(f"schedule: a warmup of {warmup} steps is longer than the whole run of {total} steps; "
                        "shorten it, or make total longer")  # fmt: skip


def _warm_up(schedule: optax.Schedule, peak: float, warmup: int, total: int) -> optax.Schedule:
    _check_warmup(warmup, total)
    if warmup == 0:
        return schedule
    # The first rate is not zero: it is peak / warmup at step 0, and `peak` from step `warmup - 1` on.
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, schedule], [warmup])


SCHEDULES = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "one_cycle": one_cycle,
    "step": step,
    "triangle": triangle,
}


def build(text: str, steps: Steps, total: int) -> optax.Schedule:
    """The schedule that a spec such as `cosine(1e-3, warmup='5%')` names, over `total` steps.

    `steps` turns a duration into whole steps. It raises UserError for text that is no duration.
    """
    schedule = spec.bind(spec.parse_one(text), SCHEDULES, "schedule", given=("steps", "total"))(steps, total)
    if not callable(schedule):
        kind = "an optimizer, which has a key of its own" if isinstance(schedule, optax.GradientTransformation) else (
            f"a {type(schedule).__name__}")  # fmt: skip
        raise UserError(f"schedule={text!r} gives {kind}; it must give a function from the step to the learning rate")
    built: optax.Schedule = schedule
    return built


def check_name(text: str) -> None:
    """Raises UserError unless the spec names a schedule and its arguments. Values are checked where steps are known."""
    spec.bind(spec.parse_one(text), SCHEDULES, "schedule", given=("steps", "total"))
