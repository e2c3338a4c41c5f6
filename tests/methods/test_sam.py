"""SAM and ASAM: the papers' equations in NumPy, also of a user's gradients; one perturbation on eight devices."""

import jax
import numpy as np
import pytest
from cases import thorough
from stepped import CLASSES, SHAPE, batch, one_step, write_module

from imgclf_jax.core import sharding
from imgclf_jax.methods import table
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo

SPECS = ["sam(rho=0.2)", "asam(rho=0.7, eta=0.05)"]
PGD = "pgd(eps='16/255', steps=3, step_size='8/255')"


def softmax_gradients(kernel, bias, x, labels):
    """Of the mean cross-entropy of a linear model, float64."""
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = p / p.sum(1, keepdims=True) - np.eye(CLASSES)[labels]
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
    assert not np.allclose(found[0], of_kernel, atol=1e-3)  # nor is it the gradient itself


def test_per_example_gradients_need_no_fork(tmp_path, monkeypatch):
    """The page's `clipped`: the mean of the examples' gradients, each at most as long as told, in float64."""
    write_module("my_gradients.py", tmp_path, monkeypatch)
    before, after, _ = one_step(gradient=table.build_gradient("my_gradients:clipped(2.0)"))
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
