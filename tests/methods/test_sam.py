"""SAM and ASAM: the papers' equations in NumPy, also of a user's gradients; one perturbation on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from cases import thorough
from flax import linen as nn
from stepped import CLASSES, SHAPE, batch, one_step

from imgclf_jax import losses
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import Loss, Method, table
from imgclf_jax.models.norms import BatchNorm
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo

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
def test_eight_devices_take_one_perturbation(fake_config, mesh, spec):
    """The norm of SAM is over all parameters and examples, wherever they are; PGD attacks the same examples."""
    fake_config.update(gradient=spec, model="mlp(widths=(64,))", preprocess="decode(1)")
    data = DataInfo(64, SHAPE, ("a", "b", "c"), "")
    after = []
    for devices, fake_config.mesh in ((1, "data=-1"), (8, mesh)):
        programs = Programs(Recipe(fake_config, data), sharding.make_mesh(jax.devices()[:devices], fake_config.mesh))
        state = programs.init_state()
        after.append(programs.train(state, programs.zero_sums(), sharding.put_batch(batch(), programs.mesh)))
    (one, of_one), (eight, of_eight) = after
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(of_one[name], of_eight[name], rtol=1e-5)
    found = map(jax.device_get, (one.opt_state, eight.opt_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)
