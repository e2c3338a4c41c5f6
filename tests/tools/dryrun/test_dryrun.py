"""`dryrun` on virtual CPU devices, counts of operations, bytes and collectives by hand, and the figures of chips."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import programs
from compilers import skip_without
from jax import lax

import launch
from imgclf_jax.config import default_config
from imgclf_jax.core import jaxprs, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.dryrun import command as dryrun
from imgclf_jax.tools.dryrun import counts, described, table, topology
from imgclf_jax.tools.dryrun.command import collective_seconds


@pytest.mark.thorough
def test_on_virtual_devices(tmp_path, capsys):
    """Without a run and without reading an image; the printed and the written report are equal."""
    config = default_config()
    config.model, config.batch_size, config.total = "mlp(widths=(16,))", 64, "20 steps"
    config.schedule = "constant(1e-3)"
    workdir, facts = Workdir(tmp_path), {"classes": 5, "targets": None, "examples": 1000}
    assert dryrun.main(config, workdir, "cpu:8", "8,8,3", "json", **facts) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "dryrun-cpu-8.json").read_text())
    parameters = (8 * 8 * 3 * 16 + 16) + (16 * 5 + 5)
    assert found["memory"]["parameters"] == 4 * parameters
    assert found["memory"]["optimizer"] == 4 * (2 * parameters + 2)  # Adam's moments and counts
    assert found["flops"] == 2 * 8 * (2 * 192 * 16 + 3 * 16 * 5)  # 8 images a device; the first layer's input: none
    assert found["collectives"]["all-reduce"]["bytes"] >= 4 * parameters
    sizes = [size for name, size in found["memory"].items() if name not in ("capacity", "peak")]
    assert found["memory"]["peak"] == pytest.approx(sum(sizes), rel=0.02)  # the new state replaces the old one
    assert found["fits"]
    assert {"train", "eval"} == set(found["compile_seconds"])
    assert "seconds" not in found  # a CPU has no published figures


@pytest.mark.thorough
def test_what_does_not_fit(monkeypatch, capsys):
    """On a chip that is slightly too small; the time of a step is that of its scarcest resource."""
    mlp = programs(classes=3, batch_size=64)
    chip, v5e = dataclasses.replace(table.CHIPS["v5e"], memory=1_000), topology.parse("v5e:2x4")
    monkeypatch.setitem(table.CHIPS, "v5e", chip)
    found = dryrun.report(mlp, v5e)
    assert not found["fits"]
    assert found["flops"] == 2 * 8 * (2 * 144 * 16 + 3 * 16 * 3)  # 8 images a chip; the first layer's input: none
    seconds = found["seconds"]
    assert seconds["compute"] == pytest.approx(found["flops"] / chip.flops_float32)
    assert seconds["memory"] == pytest.approx(found["bytes"] / 819e9)
    size = found["collectives"]["all-reduce"]["bytes"]
    assert seconds["network"] == pytest.approx(2 * 7 / 8 * size / 200e9)
    assert seconds["step"] == seconds[found["bound_by"]] == max(seconds.values())
    assert found["images_per_second"] == 64 / seconds["step"]
    monkeypatch.setitem(table.CHIPS, "v5e", dataclasses.replace(chip, memory=found["memory"]["peak"]))
    found = dryrun.report(mlp, v5e)
    assert found["fits"]
    dryrun._print(found)
    assert "images per second" in capsys.readouterr().out


def test_data_that_are_not_here():
    """TFDS knows classes and shape without the data; their number must be given."""
    config = default_config()
    config.data.source, config.preprocess = "tfds('imagenet2012')", "decode(3)|random_resized_crop(224)"
    with pytest.raises(UserError, match="--examples"):
        described.describe(config)
    assert described.describe(config, targets=3, examples=8).target_names == ("0", "1", "2")
    info = described.describe(config, examples=1_281_167)
    assert (info.train_examples, info.image_shape, len(info.class_names)) == (1_281_167, (224, 224, 3), 1000)
    config.data.source = "folder('/nowhere')"
    with pytest.raises(UserError, match=r"--shape=224,224,3 --classes=1000 \(or --targets=N\) --examples=1281167"):
        described.describe(config, classes=3)


@pytest.mark.chips
@pytest.mark.parametrize("chips", ["v5e:2x4", "h100:8"])
def test_for_chips_that_are_not_here(chips, tmp_path):
    """The default recipe, by the real compilers."""
    skip_without(chips)
    flags = [f"--chips={chips}", f"--workdir={tmp_path}", "--format=json"]
    command = [sys.executable, str(Path(launch.__file__)), "dryrun", *flags]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["fits"]
    assert found["collectives"]["all-reduce"]["bytes"] >= found["memory"]["parameters"]
    assert found["bound_by"] in ("memory", "network")  # its products are the least of it


@pytest.mark.parametrize(
    ("kind", "teraflops"),  # of matmul_precision float32, tensorfloat32 and bfloat16
    [("v5e", (197 / 6, 197 / 3, 197)), ("h100", (66.9, 494.7, 494.7)), ("a100", (19.5, 156, 156))],
)
def test_the_peak_of_float32_programs_follows_the_precision_of_products(kind, teraflops):
    chip = table.CHIPS[kind]
    found = [chip.peak("float32", products) for products in ("float32", "tensorfloat32", "bfloat16")]
    assert found == pytest.approx([1e12 * t for t in teraflops])
    assert {chip.peak("bfloat16", products) for products in ("float32", "bfloat16")} == {chip.flops}


@pytest.mark.parametrize(("chip", "chips", "a_host", "kind", "size", "seconds"), [
    ("h100", 32, 8, "all-reduce", 80e6, 2 * 80e6 * 7 / 8 / 450e9 + 2 * 10e6 * 3 / 4 / 50e9),
    ("h100", 32, 8, "all-gather", 80e6, 80e6 * 7 / 8 / 450e9 + 10e6 * 3 / 4 / 50e9),
    ("h100", 32, 8, "reduce-scatter", 80e6 / 32, 80e6 * 7 / 8 / 450e9 + 10e6 * 3 / 4 / 50e9),
    ("h100", 8, 8, "all-reduce", 80e6, 2 * 80e6 * 7 / 8 / 450e9),
    ("h100", 8, 1, "all-reduce", 80e6, 2 * 80e6 * 7 / 8 / 50e9),
    ("v5e", 16, 16, "all-reduce", 80e6, 2 * 80e6 * 15 / 16 / 200e9), ("v5e", 1, 1, "all-reduce", 80e6, 0.0),
])  # fmt: skip
def test_a_ring(chip, chips, a_host, kind, size, seconds):
    """Each byte of an all-reduce goes round twice: within a host over NVLink, then in parts over the network."""
    assert collective_seconds(table.CHIPS[chip], chips, a_host, kind, int(size)) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "v5e:8", "v5e:0x4", "h100:2x2x2", "v9:4", "h100:-1", "a100:2x9"])
def test_other_arrangements_are_refused(text):
    with pytest.raises(UserError, match=r"allowed: v5e:4x4, .* cpu:8"):
        topology.parse(text)


def flops(function, *shapes):
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, "float32") for s in shapes))
    return jaxprs.matmul_flops(jaxpr)


def test_products_and_convolutions():
    """A multiply-add is two operations."""
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 2 * 4 * 3 * 5 * 7

    def conv(groups, strides, x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (strides, strides), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    assert flops(lambda x, k: conv(1, 1, x, k), (2, 8, 8, 4), (3, 3, 4, 6)) == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    assert flops(lambda x, k: conv(4, 2, x, k), (2, 8, 8, 4), (3, 3, 1, 4)) == 2 * (2 * 4 * 4 * 4) * (3 * 3)


def test_loops_and_branches():
    """A loop of known length counts that often, one of unknown length once; of branches, the most expensive."""
    a = (4, 4)
    assert flops(lambda x: lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0], a) == 5 * 128
    assert flops(lambda x: lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ c, x), a) == 128
    assert flops(lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x), a) == 128


def test_bytes_per_device():
    mesh = sharding.make_mesh()
    whole = jax.ShapeDtypeStruct((16, 3), "float32", sharding=sharding.replicated(mesh))
    split = jax.ShapeDtypeStruct((16, 3), "bfloat16", sharding=sharding.sharded(mesh))
    assert counts.bytes_per_device({"a": whole, "b": split, "c": np.zeros(5, np.int8)}) == 16 * 3 * 4 + 2 * 3 * 2 + 5


HLO = """
  %all-reduce = f32[16,2]{1,0} all-reduce(%a), channel_id=1, replica_groups={{0,1}}, to_apply=%sum
  ROOT %both = (bf16[8]{0}, f32[]) all-reduce(%a, %b), channel_id=2, to_apply=%sum
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%a), channel_id=3, dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %move = (u8[4]{0}, u8[4]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}
  %fusion = pred[64]{0} fusion(%all-reduce), kind=kLoop, calls=%fused
"""


def test_collectives_of_hlo_text():
    """Results count, and those of an asynchronous start without its operands."""

    class Compiled:
        def as_text(self):
            return HLO

    assert counts.collective_bytes(Compiled()) == {
        "all-reduce": (2, 128 + 16 + 4), "all-gather": (1, 128), "collective-permute": (1, 4)}  # fmt: skip
