"""The figures of chips, the time of collectives by hand, and topologies."""

import pytest

from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.dryrun import table, topology
from imgclf_jax.tools.dryrun.command import collective_seconds


@pytest.mark.parametrize(
    ("kind", "teraflops"),  # of matmul_precision float32, tensorfloat32 and bfloat16
    [("v5e", (197 / 6, 197 / 3, 197)), ("h100", (66.9, 494.7, 494.7)), ("a100", (19.5, 156, 156))],
)
def test_the_peak_of_float32_programs_follows_the_precision_of_products(kind, teraflops):
    chip = table.CHIPS[kind]
    found = [chip.peak("float32", products) for products in ("float32", "tensorfloat32", "bfloat16")]
    assert found == pytest.approx([1e12 * t for t in teraflops])
    assert {chip.peak("bfloat16", products) for products in ("float32", "bfloat16")} == {chip.flops}


@pytest.mark.parametrize(("kind", "size", "seconds"), [
    ("all-reduce", 80e6, 2 * 80e6 * 7 / 8 / 450e9 + 2 * 10e6 * 3 / 4 / 50e9),
    ("all-gather", 80e6, 80e6 * 7 / 8 / 450e9 + 10e6 * 3 / 4 / 50e9),
    ("reduce-scatter", 80e6 / 32, 80e6 * 7 / 8 / 450e9 + 10e6 * 3 / 4 / 50e9),
])  # fmt: skip
def test_between_hosts_a_collective_is_done_by_parts(kind, size, seconds):
    """Four hosts with eight GPUs each: within a host over NVLink, then each GPU an eighth over the network."""
    assert collective_seconds(table.CHIPS["h100"], 32, 8, kind, int(size)) == pytest.approx(seconds)


@pytest.mark.parametrize(("chip", "chips", "a_host", "seconds"), [
    ("h100", 8, 8, 2 * 80e6 * 7 / 8 / 450e9), ("h100", 8, 1, 2 * 80e6 * 7 / 8 / 50e9),
    ("h100", 8, 4, 2 * 80e6 * 3 / 4 / 450e9 + 2 * 20e6 * 1 / 2 / 50e9), ("v5e", 16, 16, 2 * 80e6 * 15 / 16 / 200e9),
    ("v5e", 1, 1, 0.0),
])  # fmt: skip
def test_a_ring(chip, chips, a_host, seconds):
    """Each byte of an all-reduce goes round twice."""
    assert collective_seconds(table.CHIPS[chip], chips, a_host, "all-reduce", int(80e6)) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "v5e:8", "v5e:0x4", "h100:2x2x2", "v9:4", "h100:-1", "a100:2x9"])
def test_other_arrangements_are_refused(text):
    with pytest.raises(UserError, match=r"allowed: v5e:4x4, .* cpu:8"):
        topology.parse(text)
