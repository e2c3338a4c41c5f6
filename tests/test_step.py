"""The train step on eight devices and with microbatches: gradients and batch statistics of the whole batch."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough
from flax import linen as nn

from imgclf_jax import losses, step
from imgclf_jax.core import platform, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.models.classifier import Classifier

BATCH, SHAPE = 64, (8, 8, 1)


class Net(nn.Module):
    """Convolutions, with batch normalization on request."""

    norm: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(2):
            x = nn.Conv(6, (3, 3), name=f"conv{i}")(x)
            if self.norm:
                x = nn.BatchNorm(not train, momentum=0.8, name=f"bn{i}")(x)
            x = nn.gelu(x)
        return jnp.mean(x, (1, 2))


def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, *SHAPE), np.uint8)
    images[: BATCH // 2] //= 4  # so that the devices' own means differ from that of all
    return {"image": images, "label": rng.integers(0, 5, BATCH, np.int32)}


def make(net, **keys):
    """(initial state, train step) with plain SGD at learning rate 1, whose update is the gradient."""
    model, optimizer = Classifier(net, 5), optax.sgd(1.0)
    scale = lambda key, images: images.astype(jnp.float32) / 255  # noqa: E731
    train_step = step.make_train_step(model, losses.softmax, optimizer, optax.constant_schedule(1.0), scale, **keys)
    return step.init_state(model, optimizer, SHAPE, 0), train_step


@functools.cache
def run(net, devices, accumulate=1, traced_for=""):
    """(state before, state after, sums, compiled program) on this many devices."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    state, train_step = make(net, accumulate=accumulate)
    whole = sharding.replicated(mesh)
    jitted = jax.jit(train_step, in_shardings=(whole, sharding.sharded(mesh)), out_shardings=whole)
    state = jax.device_put(state, whole)
    lower = jitted.lower if not traced_for else platform.tracing_for(traced_for)(jitted.lower)
    compiled = lower(state, sharding.put_batch(batch(), mesh)).compile()
    after, sums = compiled(state, sharding.put_batch(batch(), mesh))
    return jax.device_get(state), jax.device_get(after), jax.device_get(sums), compiled.as_text()


def first_convolution(state):
    x = batch()["image"].astype(np.float32) / 255
    return np.asarray(nn.Conv(6, (3, 3)).apply({"params": state.params["backbone"]["conv0"]}, x), np.float64)


def assert_close(a, b, atol):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), a, b)


def test_batch_statistics_are_those_of_all_devices_together():
    """Gradients, statistics and loss on eight devices equal those on one, and the statistics equal NumPy's."""
    before, one, sums_one, _ = run(Net(norm=True), 1)
    _, eight, sums_eight, _ = run(Net(norm=True), 8)
    assert_close(eight.params, one.params, 2e-6)
    assert_close(eight.model_state, one.model_state, 1e-6)
    np.testing.assert_allclose(sums_eight["loss"], sums_one["loss"], rtol=1e-6)
    conv = first_convolution(before)
    stats = eight.model_state["batch_stats"]["backbone"]["bn0"]
    np.testing.assert_allclose(stats["mean"], 0.2 * conv.mean((0, 1, 2)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.8 + 0.2 * conv.var((0, 1, 2)), rtol=0, atol=1e-6)
    own = [half.mean((0, 1, 2)) for half in np.split(conv, 2)]
    assert np.abs(own[0] - own[1]).max() > 0.05  # statistics of a device's own examples would be others


@pytest.mark.parametrize(
    ("devices", "accumulate", "traced_for"),  # with eight parts on eight devices each holds one example of a part
    [(8, 4, "cpu"), *thorough((1, 2, "cpu"), (8, 8, "cpu"), (8, 4, "gpu"))],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(devices, accumulate, traced_for):
    """And so are loss and accuracy; every part lies on all devices, so that no image moves between them."""
    before, whole, sums, _ = run(Net(), devices)
    _, parts, sums_parts, program = run(Net(), devices, accumulate, traced_for)
    assert_close(parts.params, whole.params, 1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params, whole.params)
    assert min(jax.tree.leaves(moved)) > 1e-4
    assert sums_parts["correct"] == sums["correct"]
    assert sums_parts["examples"] == BATCH
    np.testing.assert_allclose(sums_parts["loss"], sums["loss"], rtol=1e-6)
    np.testing.assert_allclose(sums_parts["grad_norm"], sums["grad_norm"], rtol=1e-6)
    assert not re.search(r"all-to-all|collective-permute|all-gather", program)
    assert ("all-reduce" in program) == (devices > 1)
    assert (" while(" in program) == (traced_for != "cpu")


@pytest.mark.thorough
def test_accumulated_batch_statistics_see_one_part_after_the_other():
    """Each microbatch moves the running means: m ← 0.8 m + 0.2 mean(part), where part i is every example i modulo 4."""
    before, after, _, _ = run(Net(norm=True), 8, accumulate=4)
    conv = first_convolution(before)
    mean, var = 0.0, 1.0
    for i in range(4):
        mean = 0.8 * mean + 0.2 * conv[i::4].mean((0, 1, 2))
        var = 0.8 * var + 0.2 * conv[i::4].var((0, 1, 2))
    stats = after.model_state["batch_stats"]["backbone"]["bn0"]
    np.testing.assert_allclose(stats["mean"], mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=0, atol=1e-6)


class Noisy(nn.Module):
    """A backbone with its own rng stream; its last draw is kept as state."""

    @nn.compact
    def __call__(self, x, train=False):
        draw = lambda: jax.random.normal(self.make_rng("noise"), (3,))  # noqa: E731
        drawn = self.variable("drawn", "noise", draw)
        if train:
            drawn.value = draw()
        x = nn.Dropout(0.5, rng_collection="dropout", deterministic=not train)(jnp.mean(x, (1, 2)))
        return x + jnp.sum(drawn.value)


def test_a_module_draws_from_a_stream_of_its_own():
    """Other noise at each step and for each seed; the same for the same (seed, step), wherever the run starts."""
    state, train_step = make(Noisy())
    train_step = jax.jit(train_step)

    def noise(state):
        return np.asarray(state.model_state["drawn"]["backbone"]["noise"])

    first, _ = train_step(state, batch())
    assert (noise(state) != noise(first)).all()  # which `init` drew
    second, _ = train_step(first, batch())
    again, _ = train_step(state.replace(step=jnp.int32(1)), batch())
    other, _ = train_step(state.replace(seed=jnp.uint32(1)), batch())
    assert noise(first).any()
    assert (noise(first) != noise(second)).all()
    assert (noise(first) != noise(other)).all()
    np.testing.assert_array_equal(noise(second), noise(again))


def test_gradients_of_other_shapes_are_not_broadcast():
    def rows_of(gradient):
        def function(*args):
            out, grads = gradient(*args)
            return out, jax.tree.map(lambda x: x[:1], grads)

        return dataclasses.replace(gradient, function=function)

    state, train_step = make(Net(), gradient=rows_of)
    with pytest.raises(UserError, match="gradients that do not fit the parameters: backbone/conv0/bias is "):
        jax.eval_shape(train_step, state, batch())
