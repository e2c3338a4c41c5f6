"""`dryrun`, end to end, on virtual CPU devices; other chips need their compilers (marked `chips`)."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compilers import skip_without

import launch
from imgclf_jax.config import default_config
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.tools.dryrun import command as dryrun
from imgclf_jax.tools.dryrun import described, table, topology

ROOT = Path(__file__).parents[3]
SMALL = ("--config.model=mlp(widths=(16,))", "--config.batch_size=32", "--config.total=20 steps")


def run(*arguments):
    command = [sys.executable, str(ROOT / "launch.py"), "dryrun", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.thorough
def test_on_virtual_devices(tmp_path):
    """Without a run and without reading an image; the printed and the written report are equal."""
    data = ("--shape=8,8,3", "--classes=5", "--examples=1000", "--config.schedule=constant(1e-3)")
    done = run("--chips=cpu:4", f"--workdir={tmp_path}", "--format=json", *data, *SMALL)
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "dryrun-cpu-4.json").read_text())
    parameters = (8 * 8 * 3 * 16 + 16) + (16 * 5 + 5)
    assert found["memory"]["parameters"] == 4 * parameters
    assert found["memory"]["optimizer"] == 4 * (2 * parameters + 2)  # Adam's moments and counts
    assert found["flops"] == 2 * 8 * (2 * 192 * 16 + 3 * 16 * 5)  # 8 images a device; the first layer's input: none
    assert found["collectives"]["all-reduce"]["bytes"] >= 4 * parameters
    assert found["steps"] == 20
    assert found["fits"]
    assert {"init", "train", "eval", "augment"} == set(found["compile_seconds"])
    assert found["seconds"]["step"] == max(found["seconds"][k] for k in ("compute", "memory", "network"))


@pytest.mark.parametrize(("flags", "status", "message"), [
    ([], 2, "dryrun needs --chips"),
    (["--chips=cpu:8", "--shape=8,8"], 2, "--shape=8,8: must be height, width and channels"),
    (["--chips=cpu:8", "--classes=2", "--targets=2"], 2, "give --classes or --targets, not both"),
    (["--chips=tpu:8"], 1, "--chips=tpu:8: allowed: v5e:4x4"),
])  # fmt: skip
def test_mistakes(flags, status, message, capsys):
    assert launch.main(["dryrun", *flags]) == status
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.fixture
def programs(fake_config):
    data = DataInfo(640, (12, 12, 1), ("a", "b", "c"), "")
    fake_config.model, fake_config.batch_size = "mlp(widths=(16,))", 64
    return Programs(Recipe(fake_config, data))


@pytest.mark.thorough
def test_what_does_not_fit(programs, monkeypatch):
    """A chip too small for the state, and one that is slightly too small: the advice that would make it fit."""
    chips, memory = topology.parse("cpu:8"), 1_000
    for advice in (
        "parameters, optimizer and averages alone take",
        "accumulate=2: gradient accumulation over microbatches",
    ):
        chip = dataclasses.replace(table.CHIPS["v5e"], memory=memory)
        monkeypatch.setattr(dryrun.estimate, "chip_figures", lambda chips, chip=chip: chip)
        found = dryrun.report(programs, chips)
        assert not found["fits"]
        assert found["advice"][0].startswith(advice)
        memory = found["memory"]["peak"] - 1


def test_every_chip_repeats_the_update_of_a_replicated_parameter(fake_config):
    """Eight chips each run Muon's five Newton-Schulz iterations in full (Jordan 2024): an eighth was counted."""
    data = DataInfo(640, (12, 12, 1), ("a", "b", "c"), "")
    fake_config.update(model="mlp(widths=(16,))", batch_size=64, optimizer="muon")
    batch = 2 * 8 * (2 * 144 * 16 + 3 * 16 * 3)  # 8 images a chip; the first layer's input has no gradient
    muon = 5 * (2 * 2 * 16 * 16 * 144 + 2 * 16**3)  # of the first kernel; Adam updates the head
    for mesh, shards in (("data=8", 1), ("data=2, fsdp=4", 4)):
        programs = Programs(Recipe(fake_config, data), sharding.make_mesh(text=mesh))
        assert dryrun._matmul_flops_per_chip(programs) == pytest.approx(batch + muon / shards)


@pytest.mark.parametrize(("model", "memory", "advice", "not_advised"), [
    ("vit('Ti', patch=6)", 70_000, ["take 120 kB of each chip: mesh='data=-1, fsdp=4' (sharded)"], "remat"),
    ("vit('Ti', patch=6)", 1_000_000, ["remat='block'", "mesh='data=-1, fsdp=2'"], None),
    ("vit('Ti', patch=6)", 10_000_000, ["remat='block'"], "mesh="),
    ("vit('Ti', patch=6, remat='block')", 10_000_000, [], "remat"),
    ("mlp(widths=(16,))", 10_000_000, ["a smaller batch or image, or more chips"], "remat"),
])  # fmt: skip
def test_advice(fake_config, model, memory, advice, not_advised):
    """Rematerialization, if the model has it; a sharded state, if it takes much of a chip's memory."""
    found = advised(fake_config, model, memory)
    for text in advice:
        assert any(text in line for line in found), found
    assert not not_advised or not_advised not in str(found), found


@pytest.mark.parametrize(
    ("mesh", "memory", "parts"),
    # What each chip holds is 120 kB with the mesh that the run has.
    [("data=4, fsdp=2", 130_000, 4), ("data=4, fsdp=2", 70_000, 8), ("data=4, fsdp=2", 20_000, 8),
     ("data=1, fsdp=8", 130_000, None), ("data=1, fsdp=8", 70_000, None)],
)  # fmt: skip
def test_a_run_in_parts_is_advised_more_of_them(fake_config, mesh, memory, parts):
    """As few shards as leave half of a chip for the rest; no advice if each chip has its own shard."""
    found = str(advised(fake_config, "mlp(widths=(16,))", memory, mesh))
    assert f"mesh='data=-1, fsdp={parts}'" in found if parts else "mesh=" not in found, found


def advised(config, model, memory, mesh="data=-1"):
    """The advice for a run on eight devices with this much memory, each of which holds 120 kB of state."""
    config.model, config.batch_size, config.precision = model, 8, "bfloat16"
    data = DataInfo(640, (12, 12, 1), ("a", "b", "c"), "")
    programs = Programs(Recipe(config, data), sharding.make_mesh(text=mesh))
    result = {"accumulate": 1, "batch_size": 8, "precision": "bfloat16",
              "memory": {"capacity": memory, "parameters": 40_000, "optimizer": 80_000, "averages": 0, "batch": 0,
                         "temporaries": 20_000_000}}  # fmt: skip
    return dryrun._advice(result, programs)


def test_what_the_compiler_refuses(programs, monkeypatch):
    """It quotes a compiler that runs out of memory."""

    class Full:
        jaxpr = dataclasses.replace(programs).traced_train.jaxpr  # which is remembered

        def lower(self):
            raise RuntimeError("RESOURCE_EXHAUSTED: CompileTimeHbmOom\nUsed 21.3G of 15.75G hbm. Exceeded by 5.5G.")

    monkeypatch.setattr(Programs, "traced_train", Full())
    found = dryrun.report(programs, topology.parse("cpu:8"))
    assert (found["fits"], found["program"]) == (False, "train")
    assert found["compiler"] == "Used 21.3G of 15.75G hbm. Exceeded by 5.5G."
    assert "accumulate=2: gradient accumulation over microbatches" in found["advice"]


def test_data_that_are_not_here():
    """TFDS knows classes and shape without the data; their number must be given."""
    config = default_config()
    config.data.source, config.preprocess = "tfds('imagenet2012')", "decode(3)|random_resized_crop(224)"
    with pytest.raises(UserError, match="--examples"):
        described.describe(config, described.Facts())
    info = described.describe(config, described.Facts(examples=1_281_167))
    assert (info.train_examples, info.image_shape, len(info.class_names)) == (1_281_167, (224, 224, 3), 1000)
    config.data.source = "folder('/nowhere')"
    with pytest.raises(UserError, match=r"--shape=224,224,3 --classes=1000 \(or --targets=N\) --examples=1281167"):
        described.describe(config, described.Facts(classes=3))


def test_a_run_on_targets_is_planned_with_them(fake_config):
    """The batch has numbers instead of labels, whether flags or the data say so."""
    fake_config.loss, fake_config.batch_size = "sigmoid", 8
    given = described.Facts((12, 12, 1), None, 3, 640)
    info = described.describe(fake_config, given)
    assert info.target_names == info.class_names == ("0", "1", "2")
    assert Programs(Recipe(fake_config, info)).batch_shape["target"].shape == (8, 3)
    assert described.describe(fake_config, dataclasses.replace(given, targets=None, classes=3)).target_names == ()


@pytest.mark.chips
@pytest.mark.parametrize("chips", ["v5e:2x4", "h100:8"])
def test_for_chips_that_are_not_here(chips, tmp_path):
    """The default recipe, by the real compilers."""
    skip_without(chips)
    found = json.loads(run(f"--chips={chips}", f"--workdir={tmp_path}", "--format=json").stdout)
    assert found["fits"]
    assert found["collectives"]["all-reduce"]["bytes"] >= found["memory"]["parameters"]
    assert found["bound_by"] in ("memory", "network")  # its products are the least of it


def test_what_is_printed_is_in_two_columns(capsys):
    """Also beside the longest name; compile times are said once."""
    result = {
        "model": "cnn", "chips": "v5e:1", "batch_size": 8, "precision": "float32", "fits": True, "source": "Google",
        "memory": {"capacity": 16, "parameters": 4, "peak": 8}, "compile_seconds": {"init": 1.0, "train": 2.0},
        "seconds": {"compute": 1e-3, "memory": 2e-3, "network": 0.0, "step": 2e-3}, "augment_bytes": 1.0,
        "bytes": 4.0, "flops": 1e9, "bound_by": "memory", "images_per_second": 4000.0, "run_seconds": 4.0,
        "steps": 2000, "chip_hours": 1.0, "collectives": {"reduce-scatter": {"count": 1, "bytes": 4}},
    }  # fmt: skip
    dryrun._print(result)
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("cnn on v5e:1")
    columns = {re.match(r"  \S+(?: \S+)*  +", row).end() for row in rows}
    assert columns == {len("  images per second  ")}
    assert sum("init 1.0 s" in row for row in rows) == 1
