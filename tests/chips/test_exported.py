"""A model exported as StableHLO compiles for absent chips."""

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
