"""This project's networks, compiled for accelerators, cost at most as much as linen's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from compilers import skip_without

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "twins.py"


@pytest.mark.chips
@pytest.mark.parametrize("name", ["vit", "resnet50"])
@pytest.mark.parametrize("chips", ["v5e:1x1", "h100:1"])
def test_no_more_traffic_and_memory_than_in_plain_linen(chips, name, tmp_path):
    """For a training step on 128 images in bfloat16, with a tolerance of two per cent for compilers."""
    row = figures(chips, name, tmp_path)
    for key in ("bytes", "temporaries", "float32_products"):
        assert row["ours"][key] <= 1.02 * row["linen"][key], key


@pytest.mark.chips
def test_what_is_summed_over_gpus_in_which_dtype(tmp_path):
    """Kernels of the backbone in bfloat16, as in linen; the head and every bias in float32."""
    row = figures("h100:2", "cnn", tmp_path)["ours"]["summed_over_chips"]
    kernels = 9 * 32 + 9 * 32 * 64 + 1600 * 64
    assert row == {"bf16": kernels, "f32": 121_930 - kernels + 1}  # and the loss


def figures(chips, name, tmp_path):
    """The benchmark's statistics of one network; skips the test if the chip's compiler is missing."""
    skip_without(chips)
    command = [sys.executable, SCRIPT, f"--chips={chips}", f"--model={name}", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.glob("*.json")
    return json.loads(file.read_text(encoding="utf-8"))["rows"][name]
