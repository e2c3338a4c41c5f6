"""Cases that the default suite leaves out, a config of few steps, its training without a run, and a run cut short."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict


def thorough(*cases: Any) -> list[Any]:
    """Each case, or tuple of arguments, marked `thorough`: more of what the cases beside them check."""
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.thorough) for c in cases]


def short_config() -> ConfigDict:
    """A config that trains in seconds, on data without files."""
    from imgclf_jax.config import default_config

    config = default_config()
    config.update(total="12 steps", batch_size=16, preprocess="decode(1)", model="mlp(widths=(16,))",
                  log_every="5 steps", eval_every="6 steps", checkpoint_every="4 steps")  # fmt: skip
    config.data.source = "fake(64, (12, 12, 1), 4)"
    return config


def rewind(workdir: Path, step: int) -> None:
    """Takes a run back to its checkpoint of `step`, as if it had been killed after that."""
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdecimal() and int(folder.name) > step:
            shutil.rmtree(folder)
    (workdir / "result.json").unlink()


def trained_for(config: ConfigDict, steps: int) -> tuple[Any, ...]:
    """(programs, training split, its images, train state) after the first `steps` of a config, without a run."""
    from imgclf_jax import datasets
    from imgclf_jax.data import sources, stream
    from imgclf_jax.programs import programs_for_images

    split = sources.take_split(datasets.open_data(config), config.data.train)
    images = stream.Images(split, config.preprocess, config.seed)
    programs = programs_for_images(config, images)
    state, sums = programs.init_state(), programs.zero_sums()
    for _, batch in programs.batches(images, range(steps)):
        state, sums = programs.train(state, sums, batch)
    return programs, split, images, state
