"""Every backbone: its published size, and a step of training and evaluation in bfloat16 on eight devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import programs, thorough
from test_forms import SMALL, random_variables

from imgclf_jax import metrics
from imgclf_jax.core import sharding
from imgclf_jax.models import classifier, convnext, vit
from imgclf_jax.models.airbench import AirBench
from imgclf_jax.models.backbones import BACKBONES
from imgclf_jax.models.convnext import GRN, ConvNeXtBlock
from imgclf_jax.models.layers import SqueezeExcite, he_conv
from imgclf_jax.models.vit import sincos_positions

# Of the whole classifier. Sources: torchvision's and timm's tables; for CIFAR the papers' and the public checkpoints'.
COUNTS = [
    ("resnet(depth=18)", 224, 1000, 11_689_512),
    ("resnet_cifar(depth=20)", 32, 10, 269_722),
    ("wide_resnet(depth=28, width=10)", 32, 10, 36_479_194),
    ("convnext('T')", 224, 1000, 28_589_128),
    ("efficientnet('B0')", 224, 1000, 5_288_548),
    ("mobilenet('V3-L')", 224, 1000, 5_483_032),
    ("regnety('4GF')", 224, 1000, 20_646_656),
    ("squeezenet", 224, 1000, 1_235_496),
    ("vit('S', patch=16)", 224, 1000, 22_050_664),
    ("mixer('S')", 224, 1000, 18_528_264),
    *thorough(
        ("resnet(depth=34)", 224, 1000, 21_797_672),
        ("resnet(depth=50)", 224, 1000, 25_557_032),
        ("resnet(depth=101)", 224, 1000, 44_549_160),
        ("resnet(depth=152)", 224, 1000, 60_192_808),
        ("resnet_cifar(depth=110)", 32, 10, 1_727_962),
        ("wide_resnet(depth=40, width=4)", 32, 10, 8_949_210),
        ("convnext('S')", 224, 1000, 50_223_688),
        ("convnext('B')", 224, 1000, 88_591_464),
        ("vit('Ti', patch=16)", 224, 1000, 5_717_416),
        ("vit('B', patch=16)", 224, 1000, 86_567_656),
        ("vit('B', patch=32)", 224, 1000, 88_224_232),
        ("vit('L', patch=16)", 224, 1000, 304_326_632),
        ("mixer('B')", 224, 1000, 59_880_472),
    ),
]


def variables_shape(spec, size, classes, channels=3):
    model = classifier.build(spec, classes, "float32")
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, channels))))


@pytest.mark.parametrize(("spec", "size", "classes", "count"), COUNTS)
def test_published_parameter_counts(spec, size, classes, count):
    assert sum(x.size for x in jax.tree.leaves(variables_shape(spec, size, classes)["params"])) == count


@pytest.mark.thorough
def test_published_standard_deviations(monkeypatch):
    """Of 0.02 (torchvision, timm), which a normal distribution truncated at two of them does not have: 0.0176."""
    block = jax.jit(ConvNeXtBlock().init)(jax.random.key(0), jnp.zeros((1, 7, 7, 96)))["params"]
    monkeypatch.setitem(vit._VIT, "Ti", (192, 2, 3))  # two layers are enough
    model = classifier.build("vit('Ti', patch=4)", 10, "float32")
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    kernels = [x for x in jax.tree.leaves(block) if x.ndim > 1]
    positions = variables["params"]["backbone"]["positions_embedding"]
    assert [float(x.std()) for x in (*kernels, positions)] == pytest.approx([0.02] * 4, rel=0.03)


def test_airbench_parameter_count():
    """By the paper's table: whitening, three groups, the head (which here has a bias of ten)."""
    whiten, widths = 24 * 12 + 24, (24, 64, 256, 256)
    groups = sum(9 * a * b + 9 * b * b + 2 * b for a, b in itertools.pairwise(widths))
    shapes = variables_shape("airbench", 32, 10)["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == whiten + groups + 256 * 10 + 10


@pytest.mark.usefixtures("shallow")
@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_step_in_bfloat16_over_eight_devices(name):
    """Loss and gradients are finite, every parameter moves or has no gradient by design, and statistics move."""
    (spec, size), rng = SMALL[name], np.random.default_rng(0)
    exp = programs((size, size, 3), model=spec, precision="bfloat16", augment="flip_lr|normalize(0.5, 0.25)",
                   schedule="constant(0.1)", optimizer="sgd")  # fmt: skip
    assert exp.mesh.size == 8
    batch = {"image": rng.integers(0, 256, (16, size, size, 3), np.uint8), "label": rng.integers(0, 4, 16, np.int32)}
    state = exp.init_state()
    before = jax.tree.map(np.asarray, (state.params, state.model_state))
    state, sums = exp.train(state, exp.zero_sums(), sharding.put_batch(batch, exp.mesh))
    assert int(sums["nonfinite_step"]) == metrics.NO_STEP
    assert 0 < float(sums["grad_norm"]) < 1e4
    assert float(sums["loss"]) / 16 < 20
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves((state.params, state.model_state)), strict=True):
        assert old.dtype == new.dtype == np.float32
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, (state.params, state.model_state))
    still = [jax.tree_util.keystr(p) for p, m in jax.tree_util.tree_leaves_with_path(moved) if not m]
    assert not still, still

    padded = sharding.put_batch({**batch, "mask": np.arange(16) < 13}, exp.mesh)
    sums, _ = exp.eval(state.params, state.model_state, padded)
    assert sums["examples"] == 13
    assert np.isfinite(sums["loss"])


@pytest.mark.parametrize("name", ["vit", *thorough("airbench", "convnext", "mixer", "resnet", "wide_resnet")])
@pytest.mark.usefixtures("shallow")
def test_train_and_evaluation_differ_where_they_should(name):
    """Evaluation is deterministic; training draws anew for another key, or normalizes by the batch."""
    spec, size = SMALL[name]
    model = classifier.build(spec, 4, "float32")
    x = np.random.default_rng(0).normal(size=(8, size, size, 3)).astype(np.float32)
    variables = random_variables(model, x)
    others = [k for k in variables if k != "params"]
    keys = [jax.random.key(1), jax.random.key(2)]

    @jax.jit
    def run(key):
        train, _ = model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=others)
        return train, model.apply(variables, x)

    (train_1, eval_1), (train_2, eval_2) = run(keys[0]), run(keys[1])
    np.testing.assert_array_equal(eval_1, eval_2)
    assert np.any(train_1 != eval_1)
    drawn = "drop" in spec
    assert np.any(train_1 != train_2) == drawn


@pytest.mark.parametrize(("module", "spec", "blocks"), [(convnext, "convnext('T'", 18), (vit, "vit('Ti'", 12)])
def test_stochastic_depth_grows_linearly_to_the_last_block(module, spec, blocks, monkeypatch):
    spec, rates = f"{spec}, drop_path=0.5)", set()
    monkeypatch.setattr(module, "drop_path", lambda block, x, rate, train: rates.add(rate) or x)
    jax.eval_shape(classifier.build(spec, 4, "float32").init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    np.testing.assert_allclose(sorted(rates), np.linspace(0, 0.5, blocks), rtol=1e-12)


def test_sincos_positions_are_their_definition():
    """At (y, x): sin(x w), cos(x w), sin(y w), cos(y w), with w from 1 to 1e-4 in a geometric sequence."""
    table = sincos_positions(3, 5, 8)
    for y in range(3):
        for x in range(5):
            w = np.array([1.0, 1e-4])
            expected = np.concatenate([np.sin(x * w), np.cos(x * w), np.sin(y * w), np.cos(y * w)])
            np.testing.assert_allclose(table[y * 5 + x], expected, rtol=0, atol=1e-6)


def test_whitening_whitens():
    """The first half of the filters' outputs on the images' own patches are uncorrelated with variance v / (v + e)."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(20, 9, 8, 3)).cumsum(1).cumsum(2).astype(np.float32) / 10
    params = AirBench.init_on_images({"whiten": {"kernel": None, "bias": 0}, "head": 1}, jnp.asarray(images))
    assert params["whiten"]["bias"] == 0
    kernel = np.asarray(params["whiten"]["kernel"], np.float64)
    assert kernel.shape == (2, 2, 3, 24)
    np.testing.assert_array_equal(kernel[..., :12], -kernel[..., 12:])
    patches = np.stack([images[b, i : i + 2, j : j + 2].ravel() for b in range(20) for i in range(8) for j in range(7)])
    outputs = patches.astype(np.float64) @ kernel[..., :12].reshape(12, 12)
    values = np.linalg.eigvalsh(np.float64(patches.T) @ patches / len(patches))[::-1]
    np.testing.assert_allclose(outputs.T @ outputs / len(outputs), np.diag(values / (values + 5e-4)), atol=2e-3)


X = np.random.default_rng(0).normal(size=(2, 7, 8, 16)).astype(np.float32)


def test_global_response_normalization():
    """Equations 1 to 3 of ConvNeXt V2; a channel of zeros has finite gradients."""
    x, scale, bias = X * (np.arange(16) != 3), X[0, 0, 0], X[0, 0, 1]
    norm = np.sqrt((x**2).sum((1, 2), keepdims=True))
    expected = scale * x * norm / (norm.mean(-1, keepdims=True) + 1e-6) + bias + x
    run = jax.jit(lambda x: GRN().apply({"params": {"scale": scale, "bias": bias}}, x))
    np.testing.assert_allclose(run(x), expected, atol=1e-5)
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(run(x)))))(x)))


def test_squeeze_and_excitation():
    v = random_variables(SqueezeExcite(4), X)["params"]
    hidden = np.maximum(X.mean((1, 2)) @ v["reduce"]["kernel"][0, 0] + v["reduce"]["bias"], 0)
    gate = 1 / (1 + np.exp(-(hidden @ v["expand"]["kernel"][0, 0] + v["expand"]["bias"])))
    np.testing.assert_allclose(SqueezeExcite(4).apply({"params": v}, X), X * gate[:, None, None], atol=1e-5)


@pytest.mark.parametrize(("kernel", "strides"), [(3, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("padding", ["SAME", None])
def test_padding_as_in_tensorflow_and_in_pytorch(kernel, strides, padding):
    """SAME: ceil(n / s) outputs, the odd pixel of padding behind; else (k - 1) / 2 pixels on each side."""
    layer = he_conv(16, kernel, strides, jnp.float32, "conv", groups=16, padding=padding)
    w = random_variables(layer, X)["params"]["kernel"]
    pads = [(kernel // 2,) * 2 for _ in (7, 8)]
    if padding:
        total = [max((-(-n // strides) - 1) * strides + kernel - n, 0) for n in (7, 8)]
        pads = [(t // 2, t - t // 2) for t in total]
    padded = np.pad(X, ((0, 0), *pads, (0, 0)))
    h, w_out = ((n - kernel) // strides + 1 for n in padded.shape[1:3])
    expected = sum(
        padded[:, i : i + strides * h : strides, j : j + strides * w_out : strides][:, :h, :w_out] * w[i, j, 0]
        for i in range(kernel) for j in range(kernel))  # fmt: skip
    np.testing.assert_allclose(layer.apply({"params": {"kernel": w}}, X), expected, atol=1e-5)
