"""Heads, normalizations and activations of the backbones, by name or import path, and blocks in Python."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from flax import linen as nn
from test_forms import assert_equal, random_variables

from imgclf_jax.augment import mixing
from imgclf_jax.core import kinds, platform
from imgclf_jax.core.errors import UserError
from imgclf_jax.models import classifier
from imgclf_jax.models.norms import BatchNorm
from imgclf_jax.models.resnet import ResNet, ResNetCIFAR, WideResNet
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo

DATA = DataInfo(64, (28, 32, 3), ("a", "b"), "")


class SEBlock(nn.Module):
    """A user's block: ordinary linen with squeeze and excitation (Hu et al. 2017)."""

    features: int
    strides: int = 1
    norm: Any = nn.BatchNorm
    activation: Any = nn.relu
    dtype: Any = jnp.float32
    last_scale: float = 1.0
    shortcut: str = "conv"
    dropout: float = 0.0
    ratio: int = 4

    @nn.compact
    def __call__(self, x, train):
        settings = {"dtype": self.dtype, "param_dtype": self.dtype}
        y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False, **settings, name="conv")(x)
        y = self.activation(self.norm("bn")(y, train))
        squeezed = nn.relu(nn.Dense(self.features // self.ratio, **settings, name="squeeze")(y.mean((1, 2))))
        y = y * nn.sigmoid(nn.Dense(self.features, **settings, name="excite")(squeezed))[:, None, None]
        return y + nn.Conv(self.features, (1, 1), self.strides, **settings, name="shortcut")(x)


class Broken(SEBlock):
    """A block with a bug inside."""

    def __call__(self, x, train):
        return x.no_such_attribute


def se_cifar(ratio=4, norm=BatchNorm, activation=nn.silu, dtype=jnp.float32):
    """How a spec names a network with a stranger's block."""
    return ResNetCIFAR(8, block=functools.partial(SEBlock, ratio=ratio), norm=norm, activation=activation, dtype=dtype)


def se_resnet(dtype=jnp.float32):
    return ResNet(18, block=SEBlock, remat="block", dtype=dtype)


def se_wide(dtype=jnp.float32):
    return WideResNet(10, 1, block=SEBlock, dtype=dtype)


def broken(dtype=jnp.float32):
    return ResNetCIFAR(8, block=Broken, dtype=dtype)


SWAPPED = {
    "resnet_cifar": ("test_parts:se_cifar(ratio=2)", 8),
    "norms": ("resnet_cifar(depth=8, norm='group_norm(num_groups=4)', activation='jax.nn:silu')", 8),
    "resnet": ("test_parts:se_resnet", 32),
    "wide_resnet": ("test_parts:se_wide", 8),
    "airbench": ("airbench(widths=(8, 8, 40), norm='group_norm(num_groups=8)', activation='silu')", 32),
    "convnext": ("convnext('T', norm='batch_norm', activation='leaky_relu(negative_slope=0.1)')", 32),
    "vit": ("vit('Ti', patch=8, norm='group_norm(num_groups=4)', activation='elu')", 16),
    "mixer": ("mixer('S', patch=8, norm='flax.linen:RMSNorm', activation='tanh')", 16),
}
# The defaults by their names.
NAMED = [
    ("resnet_cifar(depth=8)", "norm='batch_norm(momentum=0.9)', activation='relu', shortcut='pad'", 8),
    ("vit('Ti', patch=8)", "norm='layer_norm', activation='gelu'", 16),
    *thorough(("airbench(widths=(8, 8, 40))", "norm='batch_norm', activation='gelu'", 32)),
]


def build(spec, size, dtype=np.float32):
    """(model, images, variables), all random."""
    model = classifier.build(spec, 4, np.dtype(dtype).name).clone(dtype=dtype)
    x = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(dtype)
    return model, x, random_variables(model, x)


def trained(model, variables, x):
    """Logits and the other collections after a training pass."""
    others = [name for name in variables if name != "params"]
    return model.apply(variables, x, train=True, mutable=others, rngs={"dropout": jax.random.key(0)})


@pytest.mark.usefixtures("float64", "shallow")
@pytest.mark.thorough
@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_parts_are_the_same_in_both_forms(name):
    """Logits, statistics and gradients, in float64, of a user's block between layers with two forms."""
    with jax.numpy_dtype_promotion("standard"):  # which linen's normalizations need
        model, x, variables = build(*SWAPPED[name], np.float64)
        others = {k: v for k, v in variables.items() if k != "params"}

        def value(params):
            logits, statistics = trained(model, {"params": params, **others}, x)
            return jnp.sum(jnp.sin(logits)), (logits, statistics)

        run = jax.value_and_grad(value, has_aux=True)
        found = [jax.jit(platform.tracing_for(form)(run))(variables["params"]) for form in ("cpu", "gpu")]
    assert_equal(*found)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(("spec", "names", "size"), NAMED)
def test_the_defaults_have_names(spec, names, size):
    """The program and the weights' names are the same, so the published weights still fit."""

    def program(text):
        model, x, variables = build(text, size)
        return str(jax.make_jaxpr(lambda v: trained(model, v, x))(variables)), jax.tree.map(jnp.shape, variables)

    assert program(spec) == program(f"{spec[:-1]}, {names})")


@pytest.mark.usefixtures("shallow")
def test_what_a_part_is_given():
    """The widths and strides of its position, the precision and the network's normalization; the spec comes first."""
    model = classifier.build("test_parts:se_cifar(2, norm='flax.linen:BatchNorm(epsilon=0.1)')", 4, "bfloat16")
    seen = {}

    def note(call, args, kwargs, context):
        seen[context.module.path] = context.module
        return call(*args, **kwargs)

    x = jnp.zeros((2, 8, 8, 3))
    with nn.intercept_methods(note), jax.numpy_dtype_promotion("standard"):  # which linen's layers need
        jax.eval_shape(lambda: trained(model, model.init(jax.random.key(0), x), x))
    block, norm = seen["backbone", "layer2_0"], seen["backbone", "layer2_0", "bn"]
    assert (block.features, block.strides, block.ratio, block.dtype) == (32, 2, 2, jnp.bfloat16)
    assert (type(norm), norm.epsilon, norm.momentum, norm.dtype) == (nn.BatchNorm, 0.1, 0.9, jnp.bfloat16)


@pytest.mark.thorough
def test_linens_batch_norm_knows_of_training():
    ours, theirs = (build(f"resnet_cifar(depth=8, norm='{n}')", 8) for n in ("batch_norm", "flax.linen:BatchNorm"))
    (model, x, variables), (other, _, same) = ours, theirs
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, same)

    @jax.jit
    def run(variables):
        return [(trained(m, variables, x), m.apply(variables, x)) for m in (model, other)]

    (a, b) = run(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), a, b)


def test_a_mistake_in_a_strangers_block_is_shown_where_it_is(fake_config):
    """The traceback, and no sentence that blames the key."""
    fake_config.model = "test_parts:broken"
    recipe = Recipe(fake_config, DATA)
    with pytest.raises(AttributeError, match="no_such_attribute"), recipe.naming_the_key():
        jax.eval_shape(lambda: recipe.model.init(jax.random.key(0), jnp.zeros((1, 28, 32, 3))))


@kinds.random
def three_values(key, images):
    """A mixing op that returns too much."""
    return images, images, images


def test_what_a_strangers_function_returns_and_cannot_be_used_is_said_of_its_key(monkeypatch, fake_config):
    """A traceback would end in this package, where nothing is wrong."""
    monkeypatch.setattr("imgclf_jax.run.provenance.own_files", dict)  # the test itself is in the traceback
    fake_config.mix = "test_parts:three_values"
    recipe = Recipe(fake_config, DATA)
    says = r"^mix='test_parts:three_values' returns something that the step cannot use: "
    with pytest.raises(UserError, match=says), recipe.naming_the_key():
        mixing.mix_batch(recipe.mix, jax.random.key(0), {"image": jnp.zeros((2, 28, 32, 3))})


IMAGES = jnp.asarray(np.random.default_rng(0).random((2, 16, 16, 3), np.float32))


@pytest.mark.parametrize(("head_init", "deviation", "most"), [
    ("", (2 / (400 + 300)) ** 0.5, (6 / (400 + 300)) ** 0.5),
    ("normal(0.01)", 0.01, 0.1),
    ("pytorch_linear", 400**-0.5 / 3**0.5, 400**-0.5),
    ("zeros", 0.0, 0.0),
])  # fmt: skip
def test_how_the_head_begins(head_init, deviation, most):
    """The standard deviation and largest value of 400 × 300 weights; the bias starts at zero."""
    own = f", head_init={head_init!r}" if head_init else ""
    model = classifier.build(f"mlp(widths=(400,){own})", 300, "float32")
    params = model.init(jax.random.key(3), IMAGES[:1], train=False)["params"]["head"]
    assert params["kernel"].shape == (400, 300)
    np.testing.assert_allclose(params["kernel"].std(), deviation, rtol=0.01)
    assert np.abs(params["kernel"]).max() <= most
    np.testing.assert_array_equal(params["bias"], 0)


class Returns(nn.Module):
    """Calls `function` on the images; has no parameters."""

    function: object = None

    @nn.compact
    def __call__(self, x, train=False):
        return self.function(x)


@pytest.mark.parametrize(("function", "returned"), [
    (lambda x: x, r"\[2, 16, 16, 3\]"),
    (lambda x: x.mean((0, 1)), r"\[16, 3\]"),
    (lambda x: (x, x), "a tuple"),
])  # fmt: skip
def test_what_a_backbone_returns_instead_of_features_is_said(function, returned):
    model = classifier.Classifier(Returns(function), 3)
    says = rf"^the backbone returns {returned}; it must return features \[b, d\], here \[2, d\]"
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)
