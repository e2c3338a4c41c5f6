"""A short run whose records tests may change, and `reproduce` as a function: fixtures for several files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import launch

STEPS = 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The work directory of a short run on arrays of 24 images; the file is beside it."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(24, 6, 6), dtype=np.uint8), np.arange(24) % 3
    np.savez(folder / "data.npz", x_train=images, y_train=labels, x_test=images[:6], y_test=labels[:6])
    keys = {"data.source": f"arrays('{folder}/data.npz')", "preprocess": "decode(1)", "model": "mlp(widths=(4,))",
            "batch_size": 8, "total": f"{STEPS} steps", "schedule": "cosine(1e-2)", "optimizer": "sgd(momentum=0.9)",
            "log_every": "5 steps", "eval_every": "", "checkpoint_every": "", "tensorboard": False}  # fmt: skip
    assert launch.main([f"--workdir={folder}/run", *(f"--config.{key}={value}" for key, value in keys.items())]) == 0
    return folder / "run"


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of the run that may be changed."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def reproduce(capsys, monkeypatch, tmp_path):
    """Runs `reproduce` and gives (exit status, what it prints as JSON, or as it is); its `log` is what was logged."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))

    def run(*argv, format: str = "json"):
        capsys.readouterr()
        status = launch.main(["reproduce", *map(str, argv), f"--format={format}"])
        out, run.log = capsys.readouterr()
        return status, json.loads(out) if format == "json" else out

    return run


def edit(file: Path, change) -> None:
    """Changes what a JSON file holds by a function."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
