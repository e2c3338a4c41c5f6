"""The memory of each of four chips that train a sharded ViT-B, by the chips' compilers."""

import pytest
from compilers import printed

# Prints [bytes of the train program's arguments, of its temporaries], replicated and sharded, and those of parameters.
PROGRAM = """
config, found = default_config(), []
config.model, config.optimizer, config.precision = "vit('B', patch=16)", "adamw", "bfloat16"
config.batch_size, config.total = 8, "10 steps"
data = DataInfo(1000, (32, 32, 3), tuple(map(str, range(1000))), "")
for config.mesh in ("data=-1", "data=1, fsdp=4"):
    programs = Programs(Recipe(config, data), sharding.make_mesh(topology.devices(chips), config.mesh))
    memory = programs.traced_train.lower().compile().memory_analysis()
    batch = counts.bytes_per_device(programs.batch_shape)
    found.append([memory.argument_size_in_bytes - batch, memory.temp_size_in_bytes])
params = programs.shape["state"].params
print(json.dumps([*found, 4 * sum(x.size for x in jax.tree.leaves(params))]))
"""


@pytest.mark.chips
@pytest.mark.parametrize("chips", ["v5e:2x2", "h100:4"])
def test_a_quarter_of_parameters_and_optimizer_on_each_of_four(chips):
    """Small arrays are replicated. Temporaries, activations among them, are below half of the parameters."""
    (whole, _), (shard, temporaries), parameters = printed(PROGRAM, chips)
    assert whole >= 3 * parameters  # and two moments
    assert whole / 4 <= shard <= 0.27 * whole
    assert temporaries <= 0.5 * parameters
