"""The recipes for ImageNet, which are not trained here: parameters, products, schedule, and compiled at full size."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgclf_jax import config as configs
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo

CONFIGS = Path(__file__).parents[1] / "configs"
EXAMPLES = 1_281_167
EPOCH = {256: EXAMPLES / 256, 1024: EXAMPLES / 1024}
# Parameters; multiply-adds of an image, in units of 10**9, as torchvision and the DeiT paper state them.
STATED = {"imagenet_resnet50": (25_557_032, 4.09), "imagenet_vit_s16": (21_974_632, 4.6)}


def recipe(name, batch_size=0):
    config = configs.load_file(str(CONFIGS / f"{name}.py"))
    config.batch_size = batch_size or config.batch_size
    classes = tuple(map(str, range(1000)))
    return Recipe(config, DataInfo(EXAMPLES, (224, 224, 3), classes, "made up"))


def multiply_adds(jaxpr):
    """Of all products and convolutions."""
    total = 0
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            total += multiply_adds(inner) if hasattr(inner, "eqns") else 0
        out = math.prod(eqn.outvars[0].aval.shape)
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            total += out * math.prod(eqn.invars[1].aval.shape[:3])  # the kernel is HWIO
    return total


@pytest.mark.parametrize("name", STATED)
def test_parameters_and_products(name):
    run = recipe(name)
    parameters, stated = STATED[name]
    assert sum(math.prod(shape) for shape in run.parameters.values()) == parameters
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: run.model.init(jax.random.key(0), x, train=False), images)
    jaxpr = jax.make_jaxpr(lambda variables, x: run.model.apply(variables, x, train=False))(variables, images)
    assert multiply_adds(jaxpr.jaxpr) / 1e9 == pytest.approx(stated, rel=0.01)


def test_the_schedule_of_resnet50():
    """A tenth of the rate at 30, 60 and 80 epochs, after five epochs of warmup."""
    run, epoch = recipe("imagenet_resnet50"), EPOCH[256]
    assert run.total == math.ceil(90 * epoch)
    epochs = np.array([1, 2.5, 5.1, 29.9, 30.1, 59.9, 60.1, 79.9, 80.1, 90])
    expected = [0.02, 0.05, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4]
    rates = [float(run.schedule(math.ceil(e * epoch))) for e in epochs]
    np.testing.assert_allclose(rates, expected, rtol=2e-3)


def test_the_schedule_of_vit_s16():
    """10,000 steps of warmup, then half a cosine to zero at the end of 90 epochs."""
    run = recipe("imagenet_vit_s16")
    assert run.total == math.ceil(90 * EPOCH[1024]) == 112_603
    half = (10_000 + run.total) // 2
    rates = [float(run.schedule(step)) for step in (0, 4_999, 9_999, half, run.total)]
    np.testing.assert_allclose(rates, [1e-7, 5e-4, 1e-3, 5e-4, 0], rtol=1e-3, atol=1e-9)


def test_kernels_alone_decay():
    for name in STATED:
        rules = recipe(name).rules
        free = {parameter for parameter in rules.decay if not parameter.endswith(("bias", "scale"))}
        assert not free
        assert all(rules.decay[parameter] == 0 for parameter in rules.decay)
        assert len(rules.decay) > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", STATED)
def test_compiles_at_full_size(name):
    """The whole train step, for images of 224 by 224 and 1,000 classes, the batch split over eight devices."""
    assert Programs(recipe(name, batch_size=64)).train is not None
