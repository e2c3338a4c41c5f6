"""Trains the same run in many ways, whose digests of the parameters must all be equal.

The ways: how often something is logged and evaluated; where the images wait; and a resume from the middle under another
of these.
"""

import contextlib
import io
import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from flax import linen as nn
from ml_collections import ConfigDict

from imgclf_jax.config import default_config
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import command as train

STEPS, SAVED = 11, 4  # of the whole run; at which a run is resumed
PIXELS = {"airbench": 16}  # else 12
NETWORKS = {
    "cnn": "cnn(widths=(8, 16), hidden=16)",
    "resnet_cifar": "resnet_cifar(8)",
    "airbench": "airbench(widths=(8, 16))",
    "vit": "vit('Ti', patch=6)",
    "linen": "digests:Linen",  # whose convolution is XLA's own
}


class Linen(nn.Module):
    """Flax's own convolution and batch normalization."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(nn.Conv(8, (3, 3))(x)))
        return x.mean((1, 2))


class Way(NamedTuple):
    """How a run is trained: what must have no part in its result."""

    log_every: str
    placement: str = "host"


EVAL_EVERY = {"1 steps": "4 steps", "5 steps": "7 steps", "": ""}  # by `log_every`
WAYS = [Way(*values) for values in itertools.product(EVAL_EVERY, ("host", "device"))]
RESUMED = [(Way("1 steps"), Way("1 steps", "device")), (Way("", "device"), Way(""))]


def config_of(network: str, precision: str, way: Way, **more: Any) -> ConfigDict:
    """The config of a run of a few steps on small random images."""
    config = default_config()
    config.data.source, config.preprocess = "fake(96, (16, 16, 1), 4)", f"decode(1)|resize({PIXELS.get(network, 12)})"
    config.augment, config.schedule, config.batch_size = "normalize(0.3, 0.7)", "cosine(1e-2)", 16
    config.total, config.precision, config.tensorboard = f"{STEPS} steps", precision, False
    config.model, config.checkpoint.keep, config.checkpoint_every = NETWORKS[network], STEPS, f"{SAVED} steps"
    config.log_every, config.eval_every = way.log_every, EVAL_EVERY[way.log_every]
    config.data.placement = way.placement
    with config.unlocked():  # for streams of `data.extra`
        config.update(more)
    return config


def digest(folder: Path, config: ConfigDict) -> str:
    """Trains, or resumes, the run in `folder`; the digest of its parameters."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main(config, Workdir(folder)) == 0
    return json.loads((folder / "result.json").read_text())["params_sha256"]


def copy_until(source: Path, target: Path, step: int) -> None:
    """Copies a finished run as it was at `step`."""
    shutil.copytree(source, target)
    (target / "result.json").unlink()
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


def train_in_ways(
    folder: Path, network: str, precision: str, ways: Iterable[Way], resumed: Iterable[tuple[Way, Way]], **more: Any
) -> list[tuple[str, str]]:
    """(what was done, digest) for each of the `ways`, and for each of them `resumed` in another."""
    rows, folders = [], {}
    for number, way in enumerate(ways):
        folders[way] = folder / str(number)
        rows.append((str(way), digest(folders[way], config_of(network, precision, way, **more))))
    for before, after in resumed:
        copied = folder / f"resumed{len(rows)}"
        copy_until(folders[before], copied, SAVED)
        what = f"{before}, from step {SAVED} on {after}"
        rows.append((what, digest(copied, config_of(network, precision, after, **more))))
    return rows
