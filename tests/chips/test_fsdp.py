"""The memory of each of four chips that train a network in parts, by the chips' compilers."""

import pytest
from compilers import printed

# Prints [bytes of the train program's arguments, of its temporaries], whole on each chip and in parts.
PROGRAM = """
import json, sys
from imgclf_jax.chips import topology

chips = topology.parse(sys.argv[1])
topology.prepare(chips)

from imgclf_jax.chips import counts
from imgclf_jax.config import default_config
from imgclf_jax.core import sharding
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo

config, found = default_config(), []
config.model, config.optimizer, config.precision = "vit('S', patch=16)", "adamw", "bfloat16"
config.batch_size, config.steps_per_call, config.total = 8, 1, "10 steps"
data = DataInfo(1000, (32, 32, 3), tuple(map(str, range(1000))), "")
for config.mesh in ("data=-1", "data=1, fsdp=4"):
    programs = Programs(Recipe(config, data), sharding.make_mesh(topology.devices(chips), config.mesh))
    memory = programs.traced_train.lower().compile().memory_analysis()
    batch = counts.bytes_a_device(programs.chunk_shape(1))
    found.append([memory.argument_size_in_bytes - batch, memory.temp_size_in_bytes])
print(json.dumps(found))
"""


@pytest.mark.chips
@pytest.mark.parametrize("chips", ["v5e:2x2", "h100:4"])
def test_a_quarter_of_parameters_and_optimizer_on_each_of_four(chips):
    """A little more, since small arrays are whole on each chip. All in all a chip takes less as well."""
    (whole, more), (parts, less) = printed(PROGRAM, chips)
    parameters = 4 * 21_900_000
    assert whole >= 3 * parameters  # and two moments
    assert whole / 4 <= parts <= 0.3 * whole
    assert parts + less < whole + more
