"""RandAugment compiled for TPU: its memory traffic."""

import pytest
from compilers import printed

# Prints [bytes a chip, collectives] of RandAugment alone, for 128 images of ImageNet's size a chip.
PROGRAM = """
from imgclf_jax.augment import policies
from imgclf_jax.core import platform

mesh = sharding.make_mesh(topology.devices(chips))
split = sharding.sharded(mesh)

def augment(seed, images):
    return policies.randaugment(jax.random.key(seed), images, 2, 10, ops="big_vision")

seed = jax.ShapeDtypeStruct((), np.uint32, sharding=sharding.replicated(mesh))
images = jax.ShapeDtypeStruct((128 * chips.count, 224, 224, 3), np.uint8, sharding=split)
with platform.tracing_for(platform.platform_of(mesh)):
    traced = jax.jit(augment, out_shardings=split).trace(seed, images)
found = counts.count_program(traced.lower().compile())
print(json.dumps([found.bytes, sum(count for count, _ in found.collectives.values())]))
"""


@pytest.mark.chips
def test_randaugment_takes_a_tenth_of_the_traffic_of_a_vit_s16():
    """The rest of that model's step moves 38 GB per chip; each chip augments its own images."""
    traffic, collectives = printed(PROGRAM, "v5e:2x4")
    images = 128 * 224 * 224 * 3
    assert 2 * images < traffic <= 3.8e9  # they are read once and written once at least
    assert collectives == 0
