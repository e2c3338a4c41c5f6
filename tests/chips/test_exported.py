"""A model that was exported here as StableHLO compiles for chips that are not here."""

import jax
import pytest
from compilers import printed, skip_without

from imgclf_jax.config import default_config
from imgclf_jax.exports import stablehlo
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.trained import Trained

# Prints how many instructions the compiled programs of the files have that follow the chips' name.
PROGRAM = """
import json, sys
from imgclf_jax.chips import topology

chips = topology.parse(sys.argv[1])
topology.prepare(chips)

import jax
from jax import export

one = jax.sharding.SingleDeviceSharding(topology.devices(chips)[0])
found = []
for file in sys.argv[2:]:
    model = export.deserialize(bytearray(open(file, "rb").read()))
    images = jax.ShapeDtypeStruct((16, *model.in_avals[0].shape[1:]), "uint8", sharding=one)
    text = jax.jit(model.call).lower(images).compile().as_text()
    found.append(text.count(" = "))
print(json.dumps(found))
"""


@pytest.mark.chips
@pytest.mark.parametrize("chips", ["v5e:2x2", "h100:1"])
def test_an_exported_model_compiles_for_chips_that_are_not_here(chips, tmp_path):
    skip_without(chips)
    files = []
    for spec in ("cnn", "resnet_cifar(8)", "vit('Ti', patch=8)"):
        config = default_config()
        config.model = spec
        programs = Programs(Recipe(config, DataInfo(64, (32, 32, 3), tuple("abcde"), "-")))
        exported = stablehlo.program(Trained(programs, jax.device_get(programs.init()["state"]), 0), "predict")
        files.append(tmp_path / f"{len(files)}.stablehlo")
        files[-1].write_bytes(exported.serialize())
    assert min(printed(PROGRAM, chips, *map(str, files))) > 20
