"""The order of devices in a mesh follows their network. Devices are described as JAX describes those of TPU pods."""

import itertools
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from imgclf_jax.core import sharding


@dataclass(frozen=True)
class Chip:
    id: int
    coords: tuple[int, int, int]
    device_kind: str = "TPU v5 lite"
    slice_index: int = 0
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def pod(x, y, slice_index=0):
    """A slice of x by y chips, with links from chip to chip and from the last one to the first along each axis."""
    places = itertools.product(range(y), range(x))
    return [Chip(1000 * slice_index + i, (a, b, 0), slice_index=slice_index) for i, (b, a) in enumerate(places)]


def links(chips, x, y):
    """The number of links between consecutive chips, and between the last and the first."""
    around = zip(chips, [*chips[1:], chips[0]], strict=True)
    return {sum(min((p - q) % n, (q - p) % n) for p, q, n in zip(a.coords, b.coords, (x, y, 1), strict=True))
            for a, b in around}  # fmt: skip


@pytest.mark.parametrize(("x", "y"), [(4, 2), (4, 4)])
def test_one_axis_is_a_ring(x, y):
    """Consecutive chips have a link; ordered by number they would be up to three links apart."""
    chips = list(sharding._arranged(pod(x, y), [x * y]))
    assert sorted(chip.id for chip in chips) == list(range(x * y))
    assert links(chips, x, y) == {1}
    assert links(pod(x, y), x, y) != {1}


def test_an_axis_lies_along_one_of_the_torus():
    mesh = sharding._arranged(pod(16, 16), [16, 16])
    assert all(links(list(row), 16, 16) == {1} for row in (*mesh, *mesh.T))


def test_some_chips_of_a_pod_keep_their_order():
    some = [pod(4, 4)[i] for i in (0, 5, 3)]
    assert list(sharding._arranged(some, [3])) == some
    assert list(sharding._arranged(some[:1], [1])) == some[:1]


def test_the_mesh_is_that_of_jax():
    """For the devices of this machine, with axes whose shardings the compiler chooses."""
    for text, shape in (("data=-1", (8,)), ("data=2, fsdp=4", (2, 4)), ("fsdp=4,data=-1", (4, 2))):
        mesh = sharding.make_mesh(text=text)
        expected = jax.make_mesh(shape, mesh.axis_names, axis_types=(AxisType.Auto,) * len(shape))
        assert mesh == expected
        assert np.array_equal(mesh.devices.ravel(), jax.devices())
