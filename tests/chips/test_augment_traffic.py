"""RandAugment as compiled for TPU: how much memory it reads and writes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Prints [bytes a chip, collectives] of RandAugment alone, for 128 images of ImageNet's size a chip.
PROGRAM = """
import json
from imgclf_jax.chips import topology

chips = topology.parse("v5e:2x4")
topology.prepare(chips)

import jax
import numpy as np
from imgclf_jax.augment import policies
from imgclf_jax.chips import counts
from imgclf_jax.core import platform, sharding

mesh = sharding.make_mesh(topology.devices(chips))
split = sharding.sharded(mesh)

def augment(seed, images):
    return policies.randaugment(jax.random.key(seed), images, 2, 10, ops="big_vision")

seed = jax.ShapeDtypeStruct((), np.uint32, sharding=sharding.replicated(mesh))
images = jax.ShapeDtypeStruct((128 * chips.count, 224, 224, 3), np.uint8, sharding=split)
with platform.tracing_for(platform.of(mesh)):
    traced = jax.jit(augment, out_shardings=split).trace(seed, images)
found = counts.of_program(traced.lower().compile())
print(json.dumps([found.bytes, sum(count for count, _ in found.collectives.values())]))
"""


@pytest.mark.chips
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv run --extra tpu pytest -m chips"
)
def test_randaugment_takes_a_tenth_of_the_traffic_of_a_vit_s16():
    """The rest of that model's step takes 69 GB a chip; each chip has its own images to augment."""
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONPATH": str(root)}, cwd=root, capture_output=True,
        text=True, timeout=500, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    traffic, collectives = json.loads(ran.stdout.splitlines()[-1])
    images = 128 * 224 * 224 * 3
    assert 2 * images < traffic <= 6.9e9  # they are read once and written once at least
    assert collectives == 0
