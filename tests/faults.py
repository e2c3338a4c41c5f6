"""Hardware that fails, for `stress.py`: flipped bits in the state of a running job, and a source or a step that hangs.

A config names the source `faults:noise()`, or the op `faults:poison`, so the training process imports this module. The
environment variable FAULTS then says what goes wrong in this process, as JSON:

- {"flip": "step", "after": 2, "times": 1, "seed": 5}: one evaluation of the third step that is computed twice.
- {"flip": "device", …}: a device that flips a bit after every call from then on, until it is found.
- {"flip": "replica", …}: one bit, in one replica of an array, in a step that is computed once.
- {"hang": "source", "after": 40}: the source's 41st read never returns; {"hang": "step"}: a step.

FAULTS_LOG names a file to which each flip and its discovery are appended.
"""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from poisoned import poison  # noqa: F401  `faults:poison` names it

from imgclf_jax.core import tree
from imgclf_jax.data.sources import FakeSource
from imgclf_jax.train import replay

PLAN: dict[str, Any] = json.loads(os.environ.get("FAULTS", "{}"))
NOISE = 10**7  # examples: too many to be kept in memory, so that the source is read in every step
_reads = iter(range(10**9))


def flip(x: jax.Array, bit: int, place: int, device: int | None = None) -> jax.Array:
    """The array with one bit flipped: `bit` of the element `place` of the part on a device, or on all that hold it."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.device.id)
    target = shards[device or 0]

    def of(shard: Any) -> jax.Array:
        data = np.array(shard.data)
        if shard.device == target.device or (device is None and shard.index == target.index):
            flat = data.reshape(-1).view(np.uint8)
            flat[place % flat.size] ^= 1 << bit % 8
        return jax.device_put(data, shard.device)

    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, [of(shard) for shard in x.addressable_shards])


def flip_in(state: Any, rng: np.random.Generator, replica: bool = False) -> tuple[Any, str]:
    """(the state with a random bit of a random array flipped, the array's name); in one `replica` alone, or in all."""
    names = jax.tree.leaves(tree.map_named(lambda name, _: name, state))
    leaves, structure = jax.tree.flatten(state)
    able = [
        i for i, (name, x) in enumerate(zip(names, leaves, strict=True))
        if x.size and x.dtype != bool and ((name != "step" and x.is_fully_replicated) or not replica)
    ]  # fmt: skip
    i = int(rng.choice(able))
    bit, place, device = (int(rng.integers(n)) for n in (8, 10**6, len(leaves[i].addressable_shards)))
    leaves[i] = flip(leaves[i], bit, place, device if replica else None)
    return jax.tree.unflatten(structure, leaves), names[i]


def note(what: str) -> None:
    """Appends a line to FAULTS_LOG."""
    with open(os.environ["FAULTS_LOG"], "a", encoding="utf-8") as file:
        file.write(what + "\n")


def noise() -> dict[str, FakeSource]:
    """A data set without files, which may hang."""
    names = tuple("abcd")
    return {"train": Hanging(NOISE, (12, 12, 1), names, 0), "test": Hanging(NOISE, (12, 12, 1), names, NOISE)}


class Hanging(FakeSource):
    """A source that may hang."""

    def read(self, ids: np.ndarray) -> dict[str, Any]:
        """Reads the examples, or never returns."""
        if PLAN.get("hang") == "source" and next(_reads) == PLAN["after"]:
            hang()
        return super().read(ids)


def hang() -> None:
    """Never returns."""
    note("hang")
    while True:
        time.sleep(3600)


def arm() -> None:
    """Has this process compute its steps on hardware that fails as PLAN says."""
    kind, after, left, number = PLAN.get("flip"), PLAN["after"], PLAN.get("times", 1), 0
    rng, calls, checks = np.random.default_rng(PLAN.get("seed", 0)), iter(range(10**9)), iter(range(10**9))
    train, check, check_replicas = replay.Replays.train, replay.Replays.check, replay.Replays.check_replicas
    corrupted = replay.Replays.corrupted
    pending: int | None = None  # the step of a lost bit that no comparison has met

    def flipped(state: Any, step: int) -> Any:
        state, name = flip_in(state, rng, kind == "replica")
        note(f"flip at step {step}, {name}")
        return state

    def faulty_train(self: Any, state: Any, window: Any, chunk: Any, steps: range) -> tuple[Any, Any]:
        nonlocal left, number, pending
        number = next(calls)
        if PLAN.get("hang") == "step" and number == after:
            hang()
        if pending is not None and steps.start < pending:  # a bad step sent the run back to before the flip
            pending, left = None, left + 1
        state, sums = train(self, state, window, chunk, steps)
        if kind in ("device", "replica") and left and number >= after and not self._run.cadences.checks(steps):
            state = flipped(state, steps.stop)
            if kind == "replica":
                pending, left = steps.stop, left - 1
        return state, sums

    def faulty_check(self: Any, steps: range, before: Any, window: Any, chunk: Any, state: Any) -> None:
        nonlocal left, pending
        due = {"step": next(checks) >= after, "device": number >= after}
        flips = bool(left) and due.get(kind, False)
        if flips:
            left -= 1
            state = flipped(state, steps.stop)
        compare(steps.stop, flips, lambda: check(self, steps, before, window, chunk, state))

    def faulty_check_replicas(self: Any, state: Any, step: int) -> None:
        compare(step, pending == step, lambda: check_replicas(self, state, step))

    def found_corrupted(self: Any, step: int, what: str) -> None:
        nonlocal pending
        pending = None
        note(f"found at step {step}")
        corrupted(self, step, what)

    def compare(step: int, flips: bool, comparison: Callable[[], None]) -> None:
        nonlocal pending
        pending = None
        comparison()
        if flips:
            note(f"missed at step {step}")

    replay.Replays.train, replay.Replays.check = faulty_train, faulty_check
    replay.Replays.check_replicas = faulty_check_replicas  # type: ignore[method-assign]
    replay.Replays.corrupted = found_corrupted


if PLAN:
    arm()
