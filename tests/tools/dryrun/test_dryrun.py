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
    assert {"train", "eval"} == set(found["compile_seconds"])
    assert "seconds" not in found  # a CPU has no published figures


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
    """On a chip that is slightly too small; the time of a step is that of its scarcest resource."""
    chip, v5e = dataclasses.replace(table.CHIPS["v5e"], memory=1_000), topology.parse("v5e:2x4")
    monkeypatch.setitem(table.CHIPS, "v5e", chip)
    found = dryrun.report(programs, v5e)
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
    assert dryrun.report(programs, v5e)["fits"]


def test_what_the_compiler_refuses(programs, monkeypatch, capsys):
    """It quotes a compiler that runs out of memory."""

    class Full:
        jaxpr = dataclasses.replace(programs).traced_train.jaxpr  # which is remembered

        def lower(self):
            raise RuntimeError("RESOURCE_EXHAUSTED: CompileTimeHbmOom\nUsed 21.3G of 15.75G hbm. Exceeded by 5.5G.")

    monkeypatch.setattr(Programs, "traced_train", Full())
    found = dryrun.report(programs, topology.parse("cpu:8"))
    assert (found["fits"], found["program"]) == (False, "train")
    assert found["compiler"] == "Used 21.3G of 15.75G hbm. Exceeded by 5.5G."
    dryrun._print(found)
    assert "try gradient accumulation" in capsys.readouterr().out


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
        "memory": {"capacity": 16, "parameters": 4, "peak": 8}, "compile_seconds": {"train": 2.0, "eval": 1.0},
        "seconds": {"compute": 1e-3, "memory": 2e-3, "network": 0.0, "step": 2e-3},
        "bytes": 4.0, "flops": 1e9, "bound_by": "memory", "images_per_second": 4000.0, "run_seconds": 4.0,
        "steps": 2000, "chip_hours": 1.0, "collectives": {"reduce-scatter": {"count": 1, "bytes": 4}},
    }  # fmt: skip
    dryrun._print(result)
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("cnn on v5e:1")
    columns = {re.match(r"  \S+(?: \S+)*  +", row).end() for row in rows}
    assert columns == {len("  images per second  ")}
    assert sum("train 2.0 s" in row for row in rows) == 1
