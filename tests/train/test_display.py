"""What training prints: what a person wants to know of the run and of each record."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from imgclf_jax.train import display

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "values", "line"), [
    ("train", {"loss": 0.23017, "learning_rate": 1.9876e-3, "grad_norm": 1.0, "images_per_second": 12345.6},
     "step 113  epoch 5.0  train  loss 0.2302  images/s 12346"),
    ("test", {"examples": 360, "accuracy": 0.9694, "loss": 0.1154},
     "step 113  epoch 5.0  test  accuracy 0.9694  loss 0.1154"),
])  # fmt: skip
def test_a_line_of_a_record(name, values, line):
    assert display.line(113, 22.45, name, values) == line


@pytest.mark.thorough
def test_a_transcript(tmp_path):
    """The head, a line for each record, and what to run next."""
    words = [sys.executable, str(ROOT / "launch.py"), f"--workdir={tmp_path}/run",
             "--config.total=2 epochs", "--config.eval_every=1 epochs"]  # fmt: skip
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "COLUMNS": "80"}
    )
    for fact in ("data       digits: 1,437 images of 28x28x1, 10 classes", "121,930 parameters",
                 "dense                102,464", "optimizer  adam", "seed       0",
                 "  test  accuracy "):  # fmt: skip
        assert fact in done.stderr
    assert f"report --workdir {tmp_path}/run" in done.stdout
