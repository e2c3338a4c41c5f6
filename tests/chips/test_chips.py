"""For absent chips, by their compilers: exported models, and the memory of a sharded ViT-B and of images kept there."""

import pytest
from compilers import printed

# Exports models, reads the files' bytes back, and prints how many instructions their compiled programs have.
PROGRAM = """
from jax import export
from imgclf_jax.tools.export import stablehlo
from imgclf_jax.trained import Trained

devices, found = topology.devices(chips), []
one = jax.sharding.SingleDeviceSharding(devices[0])
for spec in sys.argv[2:]:
    config = default_config()
    config.model = spec
    data = DataInfo(64, (32, 32, 3), tuple("abcde"), "-")
    programs = Programs(Recipe(config, data), sharding.make_mesh(devices))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), programs.shape["state"])
    content = stablehlo.program(Trained(programs, state, 0), "predict").serialize()
    model = export.deserialize(content)
    images = jax.ShapeDtypeStruct((16, *model.in_avals[0].shape[1:]), "uint8", sharding=one)
    found.append(jax.jit(model.call).lower(images).compile().as_text().count(" = "))
print(json.dumps(found))
"""


@pytest.mark.chips
@pytest.mark.parametrize("chips", ["v5e:2x2", "h100:1"])
@pytest.mark.parametrize("specs", [("cnn", "resnet_cifar(8)"), ("vit('Ti', patch=8)",)], ids=["cnn", "transformer"])
def test_an_exported_model_compiles_for_chips_that_are_not_here(chips, specs):
    assert min(printed(PROGRAM, chips, *specs)) > 20


# Prints [bytes of the train program's arguments, of its temporaries], replicated and sharded, and those of parameters.
SHARDED = """
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
    (whole, _), (shard, temporaries), parameters = printed(SHARDED, chips)
    assert whole >= 3 * parameters  # and two moments
    assert whole / 4 <= shard <= 0.27 * whole
    assert temporaries <= 0.5 * parameters


# Prints [bytes of the images, of the arguments of the program that reads a batch, of its temporaries] for each shape.
TABLE = """
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
    for images, arguments, temporaries in printed(TABLE, chips):
        assert images <= arguments < 1.4 * images
        assert temporaries < 0.1 * images
