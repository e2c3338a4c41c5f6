"""One train step of a small model, flags of a short run, and the modules of the page on one's own code."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from imgclf_jax import losses, step
from imgclf_jax.models.classifier import Classifier

SHAPE, CLASSES = (4, 4, 1), 3
FLAGS = ("--config.preprocess=decode(1)", "--config.augment=normalize", "--config.batch_size=48",
         "--config.total=4 steps", "--config.log_every=2 steps", "--config.eval_every=", "--config.tensorboard=False",
         "--config.checkpoint_every=2 steps", "--config.schedule=constant(1e-2)")  # fmt: skip
EXTENDING = Path(__file__).parents[2] / "docs" / "extending.md"


class Flat(nn.Module):
    """The pixels, so that with the head the model is linear."""

    @nn.compact
    def __call__(self, x, train=False):
        return x.reshape(len(x), -1)


def batch(b=16):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (b, *SHAPE), np.uint8)
    return {"image": images, "label": rng.integers(0, CLASSES, b, np.int32)}


def scale(key, images):
    return images.astype(jnp.float32) / 255


def one_step(backbone=None, learned=losses.softmax, augment=scale, **more):
    """(state before, state after, sums) of one step of plain SGD at learning rate 1, whose update is the gradient."""
    model, optimizer = Classifier(backbone or Flat(), CLASSES), optax.sgd(1.0)
    state = step.init_state(model, optimizer, SHAPE, 0)
    train_step = step.make_train_step(model, learned, optimizer, optax.constant_schedule(1.0), augment, **more)
    return state, *jax.jit(train_step)(state, batch())


def write_module(name, folder, monkeypatch):
    """Writes a module that the page shows, so that it can be imported."""
    [code] = re.findall(rf"^# {name}\n.*?(?=^```$)", EXTENDING.read_text(), re.MULTILINE | re.DOTALL)
    (folder / name).write_text(code)
    monkeypatch.syspath_prepend(folder)
