"""SAM and ASAM: the papers' equations in NumPy, optax's own SAM, and all promises of a run."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough
from flax import linen as nn

from imgclf_jax import losses, step
from imgclf_jax.core import sharding, tree
from imgclf_jax.methods import table
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.models.frozen import Frozen
from imgclf_jax.optim import optimizers
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo

EXTENDING = Path(__file__).parents[2] / "docs" / "extending.md"
SHAPE, CLASSES = (4, 4, 1), 3
SPECS = ["sam(rho=0.2)", "asam(rho=0.7, eta=0.05)"]
PGD = "pgd(eps='16/255', steps=3, step_size='8/255')"


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


def one_step(gradient, backbone=None, frozen=(), **more):
    """(state before, state after, sums) of one step of SGD at learning rate 1, whose update is the gradient."""
    model, optimizer = Classifier(backbone or Flat(), CLASSES), optax.sgd(1.0)
    state = step.init_state(model, optimizer, SHAPE, 0)
    names = tuple(name for name, _ in tree.named_leaves(state.params))
    train_step = step.make_train_step(
        Frozen(model, frozenset(frozen), names) if frozen else model, losses.softmax, optimizer,
        optax.constant_schedule(1.0), scale, gradient=table.build_gradient(gradient), **more,
    )  # fmt: skip
    return state, *jax.jit(train_step)(state, batch())


def softmax_gradients(kernel, bias, x, labels):
    """Of the mean cross-entropy of a linear model, float64."""
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = p / p.sum(1, keepdims=True) - np.eye(CLASSES)[labels]
    return x.T @ p / len(x), p.mean(0)


@pytest.mark.parametrize(
    ("spec", "accumulate"), [(SPECS[0], 1), (SPECS[1], 2), *thorough((SPECS[0], 2), (SPECS[1], 1))]
)
def test_the_gradient_is_that_of_the_paper(spec, accumulate):
    """w + rho T² g / |T g|, over all parameters jointly, in float64."""
    before, after, _ = one_step(spec, accumulate=accumulate)
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
    assert not np.allclose(found[0], of_kernel, atol=1e-3)  # nor is it the gradient itself


def test_sam_is_that_of_optax():
    """SAM with Adam, three steps. Rounding differs, since optax divides g by its norm before multiplying with rho."""
    model, given, rate = Classifier(Flat(), CLASSES), batch(), optax.constant_schedule(0.1)
    adam, wrap = optimizers.build("adam", rate, 0.0), table.build_gradient("sam(0.2)")
    ours = jax.jit(step.make_train_step(model, losses.softmax, adam, rate, scale, gradient=wrap))
    state = step.init_state(model, adam, SHAPE, 0)
    theirs = optax.contrib.sam(
        optax.adam(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.2)), opaque_mode=True
    )

    def loss(params, _):
        return jnp.mean(losses.softmax(model.apply({"params": params}, scale(None, given["image"])), given["label"]))

    @jax.jit
    def by_optax(params, opt_state):
        with jax.numpy_dtype_promotion("standard"):
            grads = jax.grad(loss)(params, 0)
            updates, opt_state = theirs.update(grads, opt_state, params, grad_fn=jax.grad(loss))
            return optax.apply_updates(params, updates), opt_state

    params, opt_state = state.params, theirs.init(state.params)
    for _ in range(3):
        state, _ = ours(state, given)
        params, opt_state = by_optax(params, opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, params)


def test_per_example_gradients_need_no_fork(tmp_path, monkeypatch):
    """The page's `clipped`: the mean of the examples' gradients, each at most as long as told, in float64."""
    [code] = re.findall(r"^# my_gradients.py\n.*?(?=^```$)", EXTENDING.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "my_gradients.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    before, after, _ = one_step("my_gradients:clipped(2.0)")
    given = batch()
    x = given["image"].reshape(16, 1, -1) / 255.0
    kernel, bias = (np.float64(before.params["head"][name]) for name in ("kernel", "bias"))
    each = [softmax_gradients(kernel, bias, x[i], given["label"][i : i + 1]) for i in range(16)]
    norms = np.array([np.sqrt(np.sum(k**2) + np.sum(b**2)) for k, b in each])
    assert norms.min() < 2 < norms.max()
    for name, part in (("kernel", 0), ("bias", 1)):
        wanted = np.mean([g[part] * min(1, 2 / norm) for g, norm in zip(each, norms, strict=True)], 0)
        np.testing.assert_allclose(before.params["head"][name] - after.params["head"][name], wanted, atol=1e-6)


@pytest.mark.parametrize("mesh", thorough("fsdp=-1", "data=-1", "data=2, fsdp=4"))
@pytest.mark.parametrize("spec", [*SPECS, PGD])
def test_eight_devices_take_one_perturbation(fake_config, mesh, spec):
    """The norm of SAM is over all parameters and examples, wherever they are; PGD attacks the same examples."""
    fake_config.update(mesh=mesh, gradient=spec, model="mlp(widths=(64,))", preprocess="decode(1)")
    data = DataInfo(64, SHAPE, ("a", "b", "c"), "")
    after = []
    for devices, text in ((1, ""), (8, mesh)):
        with fake_config.unlocked():
            fake_config.mesh = text or "data=-1"
        programs = Programs(Recipe(fake_config, data), sharding.make_mesh(jax.devices()[:devices], fake_config.mesh))
        state = programs.init(0)["state"]
        after.append(programs.train(state, programs.zero_sums(), sharding.put_batch(batch(), programs.mesh)))
    (one, of_one), (eight, of_eight) = after
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(of_one[name], of_eight[name], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *map(jax.device_get, (one.opt_state, eight.opt_state))
    )
