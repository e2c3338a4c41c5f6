"""SAM, ASAM, clipping by example and PGD by the papers' equations in NumPy; one perturbation on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from cases import programs, thorough
from flax import linen as nn
from stepped import CLASSES, SHAPE, batch, one_step

from imgclf_jax import losses
from imgclf_jax.augment import ops
from imgclf_jax.core import rng, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import Loss, Method, table
from imgclf_jax.methods.pgd import attack
from imgclf_jax.models.norms import BatchNorm

SPECS = ["sam(rho=0.2)", "asam(rho=0.7, eta=0.05)"]
PGD = "pgd(eps='16/255', steps=3, step_size='8/255')"


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return BatchNorm()(x.reshape(len(x), -1), train)


def softmax_gradients(kernel, bias, x, labels):
    """Of the mean cross-entropy of a linear model, float64."""
    p = scipy.special.softmax(x @ kernel + bias, 1) - np.eye(CLASSES)[labels]
    return x.T @ p / len(x), p.mean(0)


@pytest.mark.parametrize(("spec", "accumulate"), [(SPECS[0], 1), (SPECS[1], 2), *thorough((SPECS[0], 2))])
def test_the_gradient_is_that_of_the_paper(spec, accumulate):
    """w + rho T² g / |T g|, over all parameters jointly, in float64."""
    before, after, _ = one_step(gradient=table.build_gradient(spec), accumulate=accumulate)
    given = batch()
    x, labels = given["image"].reshape(16, -1) / 255.0, given["label"]
    kernel, bias = (np.float64(before.params["head"][name]) for name in ("kernel", "bias"))
    of_kernel, of_bias = softmax_gradients(kernel, bias, x, labels)
    t, rho = (1.0, 0.2) if spec.startswith("sam") else (np.abs(kernel) + 0.05, 0.7)
    norm = np.sqrt(np.sum((t * of_kernel) ** 2) + np.sum(of_bias**2))
    wanted = softmax_gradients(kernel + rho * t**2 * of_kernel / norm, bias + rho * of_bias / norm, x, labels)
    found = [kernel - after.params["head"]["kernel"], bias - after.params["head"]["bias"]]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_per_example_clipping():
    """The mean of the examples' gradients, each at most as long as told, in float64."""
    before, after, _ = one_step(gradient=table.build_gradient("clip_per_example(2.0)"))
    given = batch()
    x = given["image"].reshape(16, 1, -1) / 255.0
    kernel, bias = (np.float64(before.params["head"][name]) for name in ("kernel", "bias"))
    each = [softmax_gradients(kernel, bias, x[i], given["label"][i : i + 1]) for i in range(16)]
    norms = np.array([np.sqrt(np.sum(k**2) + np.sum(b**2)) for k, b in each])
    assert norms.min() < 2 < norms.max()
    for name, part in (("kernel", 0), ("bias", 1)):
        wanted = np.mean([g[part] * min(1, 2 / norm) for g, norm in zip(each, norms, strict=True)], 0)
        np.testing.assert_allclose(before.params["head"][name] - after.params["head"][name], wanted, atol=1e-6)


keys: list[np.ndarray] = []  # of the calls below, as bits


def note(key):
    jax.debug.callback(lambda bits: keys.append(bits.item()), jax.random.bits(key))


def drawing(gradient):
    """A user's gradient function that draws from its key."""

    def draw(params, model_state, batch, key):
        note(key)
        return gradient(params, model_state, batch, key)

    return draw


def noted(model, given, fixed):
    note(model.make_rng("dropout"))
    return Loss(losses.softmax(model(given["image"], train=True), given["label"]))


def keys_of(spec, **more):
    keys.clear()
    one_step(learned=Method(noted), gradient=table.build_gradient(spec), **more)
    jax.effects_barrier()
    return list(keys)


def test_each_gradient_function_has_its_own_key():
    assert len({*keys_of("|".join([f"{__name__}:drawing"] * 3)), *keys_of("")}) == 5  # and dropout one in each step
    assert len({*keys_of("clip_per_example")}) == 17  # of each example, and of the batch for its loss


@pytest.mark.parametrize(("backbone", "more", "said"), [
    (Normed(), {}, "needs a model without batch statistics"),
    (None, {"accumulate": 2}, "accumulate=2 does not divide the batch of 1"),
    (None, {"learned": Method(noted, lambda key, given, augment: {**given, "few": jnp.zeros(3)})}, "'few' has the"),
])  # fmt: skip
def test_examples_that_cannot_be_clipped_one_by_one(backbone, more, said):
    with pytest.raises(UserError, match=said):
        one_step(backbone, gradient=table.build_gradient("clip_per_example"), **more)


@pytest.mark.parametrize("mesh", thorough("fsdp=-1", "data=-1", "data=2, fsdp=4"))
@pytest.mark.parametrize("spec", [*SPECS, PGD])
def test_eight_devices_take_one_perturbation(mesh, spec):
    """The norm of SAM is over all parameters and examples, wherever they are; PGD attacks the same examples."""
    after = []
    for devices, where in ((1, "data=-1"), (8, mesh)):
        of = programs(SHAPE, 3, devices, gradient=spec, model="mlp(widths=(64,))", mesh=where)
        after.append(of.train(of.init_state(), of.zero_sums(), sharding.put_batch(batch(), of.mesh)))
    (one, of_one), (eight, of_eight) = after
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(of_one[name], of_eight[name], rtol=1e-5)
    found = map(jax.device_get, (one.opt_state, eight.opt_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)


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
