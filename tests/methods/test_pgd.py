"""Adversarial training: the paper's attack in NumPy, its bounds in pixels, and all promises of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from cases import thorough
from stepped import CLASSES, SHAPE, batch, one_step
from test_sam import PGD, softmax_gradients

from imgclf_jax.augment import ops
from imgclf_jax.core import rng
from imgclf_jax.methods import table
from imgclf_jax.methods.pgd import attack

NORMALIZE = "normalize(mean=0.3, std=0.2)"
seen: list[np.ndarray] = []  # the images that the gradient function `recording` is given


def recording(gradient):
    """A user's gradient function, which keeps the images of its batch."""

    def record(params, model_state, batch, key):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch["image"])
        return gradient(params, model_state, batch, key)

    return record


def attacked(gradient, **more):
    """(state before, state after, sums, the images trained on) of one step."""
    wrap = table.build_gradient(f"{__name__}:recording|{gradient}", lambda: ops.pixel_range(NORMALIZE, 1))
    found = one_step(augment=ops.build(NORMALIZE, train=True), gradient=wrap, **more)
    jax.effects_barrier()
    return *found, seen[-1]


def by_hand(params, given, start, eps, steps, size):
    """Section 2.1 of arXiv:1706.06083 for a linear model, float64, with pixels from 0 to 1."""
    kernel, bias = (np.float64(params["head"][name]) for name in ("kernel", "bias"))
    clean = np.float64(given["image"].reshape(len(given["image"]), -1)) / 255
    x = np.clip(clean + eps * start.reshape(clean.shape), 0, 1)
    for _ in range(steps):
        p = scipy.special.softmax((x - 0.3) / 0.2 @ kernel + bias, 1) - np.eye(CLASSES)[given["label"]]
        x = np.clip(x + size * np.sign(p @ kernel.T), np.maximum(clean - eps, 0), np.minimum(clean + eps, 1))
    return x


@pytest.mark.parametrize("accumulate", [2, *thorough(1)])
def test_a_step_trains_on_the_examples_of_the_paper(accumulate):
    given = batch()
    before, after, window, images = attacked(PGD, accumulate=accumulate)
    keys = jax.random.split(rng.fold(rng.key(0, "dropout", 0), "pgd"), 16)
    start = jax.vmap(lambda key: jax.random.uniform(key, SHAPE, minval=-1, maxval=1))(keys)
    wanted = by_hand(before.params, given, np.float64(start), 16 / 255, 3, 8 / 255)
    found = images.reshape(16, -1) * 0.2 + 0.3
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    kernel, bias = (np.float64(before.params["head"][name]) for name in ("kernel", "bias"))
    of_kernel, _ = softmax_gradients(kernel, bias, (wanted - 0.3) / 0.2, given["label"])
    np.testing.assert_allclose(kernel - after.params["head"]["kernel"], of_kernel, atol=1e-5)
    _, _, plain, _ = attacked("sam(0.0)")
    assert window["loss"] > plain["loss"]  # it is that of the adversarial examples


def linear(x):
    """The gradient of a linear function."""
    return jnp.broadcast_to(jnp.array([1.0, -1.0, 0.0, 2.0]).reshape(1, 2, 2, 1), x.shape)


def test_one_step_without_a_random_start_is_fgsm():
    """x + eps sign(g), clipped to the pixel range (Goodfellow et al. 2014, arXiv:1412.6572)."""
    images, keys = jnp.array([0.5, 0.5, 0.5, 0.99]).reshape(1, 2, 2, 1), jax.random.split(jax.random.key(0), 1)
    found = attack(linear, images, keys, 0.0, 1.0, eps=0.1, steps=1, step_size=0.1, random_start=False)
    np.testing.assert_allclose(found.reshape(4), [0.6, 0.4, 0.5, 1.0], rtol=1e-6)
    eight = images.repeat(8, 0), jax.random.split(jax.random.key(0), 8)
    found = attack(linear, *eight, 0.0, 1.0, eps=0.1).reshape(8, 4)  # by default ten steps cross the ball
    np.testing.assert_allclose(np.delete(found, 2, 1), [[0.6, 0.4, 1.0]] * 8, rtol=1e-6)
