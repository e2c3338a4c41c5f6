"""The mesh of the devices of this machine."""

import jax
import numpy as np
from jax.sharding import AxisType

from imgclf_jax.core import sharding


def test_the_mesh_is_that_of_jax():
    """With axes whose shardings the compiler chooses."""
    for text, shape in (("data=-1", (8,)), ("data=2, fsdp=4", (2, 4)), ("fsdp=4,data=-1", (4, 2))):
        mesh = sharding.make_mesh(text=text)
        expected = jax.make_mesh(shape, mesh.axis_names, axis_types=(AxisType.Auto,) * len(shape))
        assert mesh == expected
        assert np.array_equal(mesh.devices.ravel(), jax.devices())
