"""Cases that the default suite leaves out; a config of few steps, its flags, programs and training; a run cut short."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict


def thorough(*cases: Any) -> list[Any]:
    """Each case, or tuple of arguments, marked `thorough`: more of what the cases beside them check."""
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.thorough) for c in cases]


def noise(*shape: int, high: int = 256, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape, dtype)


SHORT = {"data.source": "fake(64, (12, 12, 1), 4)", "preprocess": "decode(1)", "model": "mlp(widths=(16,))",
         "batch_size": 16, "total": "12 steps", "log_every": "5 steps", "eval_every": "6 steps",
         "checkpoint_every": "4 steps"}  # fmt: skip


def short_config(**keys: Any) -> ConfigDict:
    """A config that trains in seconds, on data without files; `keys` may be dotted."""
    from imgclf_jax.config import default_config

    config = default_config()
    config.update_from_flattened_dict(SHORT | keys)
    return config


def flags(*keys: str) -> tuple[str, ...]:
    """The flags of `short_config` with other keys, such as "total=2 steps"."""
    return tuple(f"--config.{key}={value}" for key, value in (SHORT | dict(k.split("=", 1) for k in keys)).items())


def programs(shape: tuple[int, ...] = (12, 12, 1), classes: int = 4, devices: int | None = None, **keys: Any) -> Any:
    """The programs of `short_config` with other keys for 64 images of a shape, on all devices or so many."""
    import jax

    from imgclf_jax.core import sharding
    from imgclf_jax.programs import Programs
    from imgclf_jax.recipe import Recipe
    from imgclf_jax.run.provenance import DataInfo

    config, data = short_config(**keys), DataInfo(64, shape, tuple(map(str, range(classes))), "")
    return Programs(Recipe(config, data), sharding.make_mesh(jax.devices()[:devices] if devices else None, config.mesh))


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
