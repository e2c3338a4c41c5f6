"""A run on digits, one of two seeds, and photographs, for the commands that look at them."""

import numpy as np
import pytest
from PIL import Image

import launch
from imgclf_jax.data import sources
from imgclf_jax.data.source import read_examples

FLAGS = ["--config.total=60 steps", "--config.model=cnn(widths=(4,), hidden=8)", "--config.schedule=constant(1e-2)",
         "--config.preprocess=decode(1)", "--config.eval_every=", "--config.checkpoint_every=",
         "--config.augment=normalize"]  # fmt: skip


@pytest.fixture(scope="module")
def flags():
    return FLAGS


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("digits") / "run"
    assert launch.main([*FLAGS, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, one_device):
    """A run of two seeds."""
    workdir = tmp_path_factory.mktemp("seeds") / "run"
    assert launch.main([*FLAGS, f"--workdir={workdir}", "--config.num_seeds=2"]) == 0
    return workdir


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Digits of three classes in folders named after them, one in another folder, and a broken one."""
    monkeypatch.chdir(tmp_path)
    examples = read_examples(sources.digits()["test"], np.arange(6))
    for i, (image, label) in enumerate(zip(examples["image"], examples["label"], strict=True)):
        folder = tmp_path / "photos" / (str(label) if i else "unknown")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    return tmp_path / "photos"
