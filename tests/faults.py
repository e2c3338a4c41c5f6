"""Hardware that fails, for `stress.py`: a flipped bit in a step that is computed twice, and a source that hangs.

A config names the source `faults:noise()`, or the op `faults:poison`, so the training process imports this module. The
environment variable FAULTS then says what goes wrong in this process, as JSON:

- {"flip": 2, "seed": 5}: the third step that is computed twice gives another bit the second time.
- {"hang": 40}: the source's 41st read never returns.

FAULTS_LOG names a file to which each fault is appended.
"""

import dataclasses
import json
import os
import time
from typing import Any

import jax
import numpy as np
from poisoned import poison  # noqa: F401  `faults:poison` names it

from imgclf_jax.data.source import Source
from imgclf_jax.data.sources import fake
from imgclf_jax.train import recompute

PLAN: dict[str, int] = json.loads(os.environ.get("FAULTS", "{}"))
NOISE = 10**7  # examples: too many to be kept in memory, so that the source is read in every step


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


def note(what: str) -> None:
    """Appends a line to FAULTS_LOG."""
    with open(os.environ["FAULTS_LOG"], "a", encoding="utf-8") as file:
        file.write(what + "\n")


def noise() -> dict[str, Source]:
    """A data set without files, which may hang."""
    reads = iter(range(10**9))

    def hanging(source: Source) -> Source:
        def read(ids: np.ndarray) -> Any:
            if next(reads) == PLAN.get("hang"):
                note("hang")
                time.sleep(10**6)
            return source.read(ids)

        return dataclasses.replace(source, read=read)

    return {name: hanging(source) for name, source in fake(NOISE, (12, 12, 1), 4).items()}


def arm() -> None:
    """Has this process flip a random bit of a random array, in all its replicas, as PLAN says."""
    rng, checks, refuse = np.random.default_rng(PLAN["seed"]), iter(range(10**9)), recompute.refuse_difference

    def faulty(step: int, first: Any, second: Any, latest: Any) -> None:
        flipped = next(checks) == PLAN["flip"]
        if flipped:
            leaves, structure = jax.tree.flatten(second)
            i = int(rng.choice([i for i, x in enumerate(leaves) if x.size and x.dtype == np.float32]))
            leaves[i] = flip(leaves[i], *(int(rng.integers(n)) for n in (8, 10**6)))
            second = jax.tree.unflatten(structure, leaves)
            note(f"flip at step {step}")
        refuse(step, first, second, latest)
        if flipped:
            note(f"missed at step {step}")

    recompute.refuse_difference = faulty


if "flip" in PLAN:
    arm()
