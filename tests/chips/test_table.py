"""The memory of images kept on a chip."""

import pytest
from compilers import printed

# Prints [bytes of the images, of the arguments of the program that reads a batch, of its temporaries] for each shape.
PROGRAM = """
import functools, math
from imgclf_jax.data import placement

config, found, examples = default_config(), [], 100_000
config.model, config.optimizer, config.data.placement, config.batch_size = "mlp(widths=(8,))", "sgd", "device", 128
for shape in (32, 32, 3), (28, 28, 1):
    data = DataInfo(examples, shape, tuple(map(str, range(10))), "")
    programs = Programs(Recipe(config, data), sharding.make_mesh(topology.devices(chips)))
    gather = jax.jit(functools.partial(placement.gather, image_shape=shape))
    table = placement.table_shape(examples, shape, 0, programs.mesh)
    memory = gather.lower(table, programs.batch_shape["label"]).compile().memory_analysis()
    found.append([examples * math.prod(shape), memory.argument_size_in_bytes, memory.temp_size_in_bytes])
print(json.dumps(found))
"""


@pytest.mark.chips
@pytest.mark.parametrize("chips", ["v5e:1x1", "h100:1"])
def test_it_is_little_more_than_the_images_and_they_are_not_copied(chips):
    """On TPU an image takes whole kilobytes. In its own shape, each batch made a copy four times as large."""
    for images, arguments, temporaries in printed(PROGRAM, chips):
        assert images <= arguments < 1.4 * images
        assert temporaries < 0.1 * images
