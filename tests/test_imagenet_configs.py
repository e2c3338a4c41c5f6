"""The ImageNet recipes, which are not trained here: parameters, schedule and initialization."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from imgclf_jax import config as configs
from imgclf_jax.models import vit
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo

CONFIGS = Path(__file__).parents[1] / "configs"
EXAMPLES = {"imagenet_resnet50": 1_281_167, "imagenet_vit_s16": 1_268_355}  # train, and TFDS's train[:99%]
# Parameters, as torchvision states them, and as big_vision's own model has them; multiply-adds: test_benchmarks.py.
STATED = {"imagenet_resnet50": 25_557_032, "imagenet_vit_s16": 22_122_472}


def recipe(name):
    config = configs.load_file(str(CONFIGS / f"{name}.py"))
    classes = tuple(map(str, range(1000)))
    return Recipe(config, DataInfo(EXAMPLES[name], (224, 224, 3), classes, "made up"))


@pytest.mark.parametrize("name", STATED)
def test_parameters(name):
    assert sum(math.prod(shape) for shape in recipe(name).parameters.values()) == STATED[name]


def test_the_schedule_of_resnet50():
    """A tenth of the learning rate at 30, 60 and 80 epochs; no warmup, for batches of 256."""
    run, epoch = recipe("imagenet_resnet50"), EXAMPLES["imagenet_resnet50"] / 256
    assert run.total == math.ceil(90 * epoch)
    epochs = np.array([0, 1, 29.9, 30.1, 59.9, 60.1, 79.9, 80.1, 90])
    expected = [0.1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4]
    rates = [float(run.schedule(math.ceil(e * epoch))) for e in epochs]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_the_schedule_of_vit_s16():
    """10,000 steps of warmup, then half a cosine to zero at the end of 90 epochs."""
    run = recipe("imagenet_vit_s16")
    assert run.total == round(90 * EXAMPLES["imagenet_vit_s16"] / 1024) == 111_477
    half = (10_000 + run.total) // 2
    rates = [float(run.schedule(step)) for step in (0, 4_999, 9_999, half, run.total)]
    np.testing.assert_allclose(rates, [1e-7, 5e-4, 1e-3, 5e-4, 0], rtol=1e-3, atol=1e-9)


def test_which_parameters_decay():
    """In the ViT the kernels only; in the ResNet all but those of batch norm."""
    for name, decaying_bias in (("imagenet_resnet50", {"head/bias"}), ("imagenet_vit_s16", set())):
        run = recipe(name)
        assert set(run.rules.decay.values()) == {0.0}
        decaying = {parameter for parameter in run.parameters if parameter not in run.rules.decay}
        assert {parameter for parameter in decaying if not parameter.endswith("kernel")} == decaying_bias
        assert len(decaying) - len(decaying_bias) == sum(parameter.endswith("kernel") for parameter in run.parameters)


@pytest.mark.thorough
def test_the_optimizer_of_vit_s16_is_big_visions(monkeypatch):
    """Its chain in big_vision's optax.py: clip, Adam, the learning rate, and a decay of 1e-4 that it does not scale."""
    monkeypatch.setitem(vit._VIT, "S", (24, 2, 3))
    run, rng = recipe("imagenet_vit_s16"), np.random.default_rng(0)
    flat = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in run.parameters.items()}
    mine = theirs = traverse_util.unflatten_dict(flat, sep="/")
    kernels = traverse_util.unflatten_dict({path: path.endswith("kernel") for path in flat}, sep="/")
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(mu_dtype="bfloat16"),
        optax.scale(1e-3),
        optax.add_decayed_weights(1e-4, kernels),
        optax.scale_by_schedule(lambda step: run.schedule(step) / 1e-3),
        optax.scale(-1.0),
    )
    with jax.numpy_dtype_promotion("standard"):
        state, other = jax.jit(run.optimizer.init)(mine), jax.jit(chain.init)(theirs)
        for _ in range(3):
            gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), mine)
            updates, state = jax.jit(run.optimizer.update)(gradient, state, mine)
            expected, other = jax.jit(chain.update)(gradient, other, theirs)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-12), updates, expected)
            mine, theirs = (jax.tree.map(np.add, *pair) for pair in ((mine, updates), (theirs, expected)))


@pytest.mark.thorough
def test_how_the_layers_of_vit_s16_begin(monkeypatch):
    """The standard deviation of each kernel as in big_vision, where linen initializes query, key and value apart."""
    monkeypatch.setitem(vit._VIT, "S", (384, 2, 6))
    model = recipe("imagenet_vit_s16").model
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)["params"])
    params = init(jax.random.key(0))
    qkv = np.split(params["backbone"]["block1"]["attn"]["qkv"]["kernel"], 3, 1)
    for own in qkv:
        np.testing.assert_allclose(own.std(), 384**-0.5, rtol=0.01)  # Xavier: 2 / (384 + 384)
        assert np.abs(own).max() < 1.00001 * (6 / (384 + 384)) ** 0.5
    deviations = {
        ("block0", "attn", "proj"): 384**-0.5,
        ("block0", "mlp", "fc1"): (2 / (384 + 1536)) ** 0.5,
        ("block1", "mlp", "fc2"): (2 / (384 + 1536)) ** 0.5,
        ("patch",): (16 * 16 * 3) ** -0.5,
        ("representation",): 384**-0.5,
    }
    for path, deviation in deviations.items():
        layer = functools.reduce(lambda tree, name: tree[name], path, params["backbone"])
        np.testing.assert_allclose(layer["kernel"].std(), deviation, rtol=0.01)
        np.testing.assert_array_equal(layer["bias"], 0)
