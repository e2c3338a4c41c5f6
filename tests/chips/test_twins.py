"""What the compilers for accelerators make of this project's networks: at most what they make of linen's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from imgclf_jax.chips import topology
from imgclf_jax.core.errors import UserError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "twins.py"


@pytest.mark.chips
@pytest.mark.parametrize("name", ["vit", "resnet50"])
@pytest.mark.parametrize("chips", ["v5e:1x1", "h100:1"])
def test_no_more_traffic_and_memory_than_in_plain_linen(chips, name, tmp_path, monkeypatch):
    """Of a training step of 128 images in bfloat16; two per cent are left to the compilers' choices."""
    for key in ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.setenv(key, "")  # which `prepare` sets, and which are as they were after the test
    try:
        topology.prepare(topology.parse(chips))
    except UserError as e:
        pytest.skip(str(e))
    command = [sys.executable, SCRIPT, f"--chips={chips}", f"--model={name}", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.glob("*.json")
    row = json.loads(file.read_text(encoding="utf-8"))["rows"][name]
    for key in ("bytes", "temporaries", "float32_products"):
        assert row["ours"][key] <= 1.02 * row["linen"][key], key
