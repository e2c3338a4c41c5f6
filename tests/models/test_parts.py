"""Normalizations and activations of the backbones, swapped by name or import path, and blocks in Python."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from flax import linen as nn
from test_forms import assert_equal, random_variables

from imgclf_jax import diagnose
from imgclf_jax.config import default_config
from imgclf_jax.core import platform
from imgclf_jax.core.errors import UserError
from imgclf_jax.models import classifier
from imgclf_jax.models.norms import BatchNorm
from imgclf_jax.models.resnet import BasicBlock, Bottleneck, ResNet, ResNetCIFAR, WideResNet
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.step import init_state
from imgclf_jax.tools.export import torch_state


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


class Broken(nn.Module):
    """A block with a bug inside."""

    features: int
    strides: int = 1
    norm: Any = nn.BatchNorm
    activation: Any = nn.relu
    dtype: Any = jnp.float32
    last_scale: float = 1.0
    shortcut: str = "conv"

    @nn.compact
    def __call__(self, x, train):
        return x.no_such_attribute


class WithNumPy(nn.Module):
    """A backbone that needs the values of its images."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(np.asarray(x).reshape(len(x), -1))


class Numbers(nn.Module):
    """A backbone that returns one number per batch."""

    @nn.compact
    def __call__(self, x, train=False):
        return jnp.float32(3)


def two_values(logits, labels):
    """A loss that returns a pair."""
    return logits, logits


def se_cifar(ratio=4, norm=BatchNorm, activation=nn.silu, dtype=jnp.float32):
    """How a spec names a network with a stranger's block."""
    return ResNetCIFAR(8, block=functools.partial(SEBlock, ratio=ratio), norm=norm, activation=activation, dtype=dtype)


def se_resnet(remat="", dtype=jnp.float32):
    return ResNet(18, block=SEBlock, remat=remat, dtype=dtype)


def se_wide(dtype=jnp.float32):
    return WideResNet(10, 1, block=SEBlock, dtype=dtype)


def linens(ratio, dtype=jnp.float32):
    return ResNetCIFAR(8, block=functools.partial(SEBlock, ratio=ratio), dtype=dtype,
                       norm=functools.partial(nn.BatchNorm, epsilon=0.1))  # fmt: skip


def broken(dtype=jnp.float32):
    return ResNetCIFAR(8, block=Broken, dtype=dtype)


def option_b():
    return ResNetCIFAR(8, block=Bottleneck)


class WithoutPrecision(nn.Module):
    """A normalization that no backbone can use."""

    def __call__(self, x):
        return x


SWAPPED = {
    "resnet_cifar": ("test_parts:se_cifar(ratio=2)", 8),
    "norms": ("resnet_cifar(depth=8, norm='group_norm(num_groups=4)', activation='jax.nn:silu')", 8),
    "resnet": ("test_parts:se_resnet", 32),
    "wide_resnet": ("test_parts:se_wide", 8),
    "airbench": ("airbench(widths=(8, 8, 40), norm='group_norm(num_groups=8)', activation='silu')", 32),
    "convnext": ("convnext('T', norm='batch_norm', activation='leaky_relu(negative_slope=0.1)')", 32),
    "vit": ("vit('Ti', patch=8, norm='group_norm(num_groups=4)', activation='elu')", 16),
    "mixer": ("mixer('S', patch=8, norm='flax.linen:RMSNorm', activation='tanh')", 16),
}  # fmt: skip
# The defaults by their names.
NAMED = [
    ("resnet_cifar(depth=8)", "norm='batch_norm', activation='relu', shortcut='pad'", 8),
    ("vit('Ti', patch=8)", "norm='layer_norm', activation='gelu'", 16),
    ("mlp(widths=(8,))", "activation='relu'", 8),
]
MORE_NAMED = [
    ("resnet(depth=18)", "norm='batch_norm', activation='relu'", 32),
    ("wide_resnet(depth=10, width=1)", "norm='batch_norm', activation='relu'", 8),
    ("airbench(widths=(8, 8, 40))", "norm='batch_norm', activation='gelu'", 32),
    ("convnext('T')", "norm='layer_norm', activation='gelu'", 32),
    ("mixer('S', patch=8)", "norm='layer_norm', activation='gelu'", 16),
    ("resnet(depth=50)", "norm='batch_norm(momentum=0.9)'", 32),
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
@pytest.mark.parametrize("other", ["gpu", "tpu"])
@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_parts_are_the_same_in_every_form(name, other):
    """Logits, statistics and gradients, in float64, of a user's block between layers with two forms."""
    with jax.numpy_dtype_promotion("standard"):  # which linen's normalizations need
        model, x, variables = build(*SWAPPED[name], np.float64)
        others = {k: v for k, v in variables.items() if k != "params"}

        def value(params):
            logits, statistics = trained(model, {"params": params, **others}, x)
            return jnp.sum(jnp.sin(logits)), (logits, statistics)

        run = jax.value_and_grad(value, has_aux=True)
        cpu, accelerator = (jax.jit(platform.tracing_for(form)(run))(variables["params"]) for form in ("cpu", other))
    assert_equal(cpu, accelerator)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(("spec", "names", "size"), [*NAMED, *thorough(*MORE_NAMED)])
def test_the_defaults_have_names(spec, names, size):
    """The program and the weights' names are the same, so the published weights still fit."""

    def program(text):
        model, x, variables = build(text, size)
        return str(jax.make_jaxpr(lambda v: trained(model, v, x))(variables)), jax.tree.map(jnp.shape, variables)

    assert program(spec) == program(f"{spec[:-1]}, {names})")


@pytest.mark.usefixtures("shallow")
def test_what_a_part_is_given():
    """The widths and strides of its position, the precision and the network's normalization; the spec comes first."""
    spec = "test_parts:linens(2)"
    model = classifier.build(spec, 4, "bfloat16")
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
    """It normalizes by the batch in training, and by the running statistics in evaluation."""
    ours, theirs = (build(f"resnet_cifar(depth=8, norm='{n}')", 8) for n in ("batch_norm", "flax.linen:BatchNorm"))
    (model, x, variables), (other, _, same) = ours, theirs
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, same)

    @jax.jit
    def run(variables):
        return [(trained(m, variables, x), m.apply(variables, x)) for m in (model, other)]

    (a, b) = run(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), a, b)


@pytest.mark.usefixtures("shallow")
def test_remat_of_a_strangers_block():
    model, x, variables = build("test_parts:se_resnet('block')", 32)
    plain = build("test_parts:se_resnet", 32)
    assert jax.tree.structure(variables) == jax.tree.structure(plain[2])
    program = str(jax.make_jaxpr(jax.grad(lambda v: jnp.sum(trained(model, v, x)[0])))(variables))
    assert program.count("prevent_cse") == 2  # a block each


@pytest.mark.parametrize(("spec", "says"), [
    ("resnet_cifar(norm='no_such_file:Norm')", "cannot import 'no_such_file' for norm 'no_such_file:Norm'"),
    ("resnet_cifar(norm='test_parts:SE')", "unknown name in module test_parts 'SE': "),
    ("resnet_cifar(norm='layer')", "unknown norm 'layer': did you mean 'layer_norm'? allowed: batch_norm, group_norm"),
    ("resnet_cifar(norm='group_norm(groups=8)')", "unknown argument 'groups': did you mean"),
    ("resnet_cifar(norm='batch_norm|relu')", "expected exactly one name(...), found 2"),
    ("mlp(activation='rellu')", "unknown activation 'rellu': did you mean 'relu'"),
])  # fmt: skip
def test_a_part_that_does_not_fit(spec, says):
    with pytest.raises(UserError) as error:
        classifier.build(spec, 4, "float32")
    assert says in str(error.value)


@pytest.mark.parametrize(("spec", "says"), [
    ("resnet_cifar(depth=8, norm='group_norm')", "groups (32) does not divide the number of channels (16)"),
    ("resnet_cifar(depth=8, norm=20)", ""),
    ("resnet_cifar(depth=8, norm='test_parts:WithoutPrecision')", "has no field 'dtype', which this network sets"),
    ("resnet_cifar(depth=8, activation='flax.linen:PReLU')", "PReLU"),
    ("resnet_cifar(depth=8, block='basic_block')", "the first argument must be callable"),
    ("resnet_cifar(depth=8, shortcut='none')", r"shortcut='none': allowed are"),
    ("resnet_cifar(depth=21)", "the depth must be 6n + 2, such as 20"),
    ("resnet_cifar(depth=2)", "the depth must be 6n + 2"),
    ("resnet_cifar(depth='20')", "resnet_cifar(depth='20')"),
    ("wide_resnet(depth=27)", "the depth must be 6n + 4, such as 28"),
    ("resnet(depth='50')", "the depth must be one of [18, 34, 50, 101, 152]"),
    ("vit(16)", "unknown vit variant 16: allowed: B, L, S, Ti"),
    ("vit('Ti', positions='none')", "sincos"),
    ("vit('Ti', pool='max')", "cls"),
    ("vit('Ti', patch=5)", "do not divide into patches of 5"),
    ("convnext('X')", "allowed: B, S, T"),
    ("mixer('L')", "allowed: B, S"),
    ("mlp(widths=(0,))", "is empty"),
    ("cnn(widths=(-1,))", "model='cnn(widths=(-1,))' fails on images"),
])  # fmt: skip
def test_values_that_a_network_cannot_have(spec, says):
    """One sentence, which names the key."""
    config = default_config()
    config.model = spec

    def start():
        recipe = Recipe(config, DataInfo(64, (32, 32, 3), ("a", "b"), ""))
        with diagnose.naming_the_key(recipe):
            state = jax.eval_shape(lambda: init_state(recipe.model, recipe.optimizer, (32, 32, 3), 0))
        diagnose.check_size(recipe, state, False)

    with pytest.raises(UserError) as error:
        start()
    assert says in str(error.value)


def test_an_image_that_vanishes_on_the_way_through_a_network():
    model = classifier.build("convnext('T')", 4, "float32")
    with pytest.raises(UserError, match="convnext: images of 28 by 40 are too small; resize them to 32 by 32 or more"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 40, 1)))


def test_what_a_block_or_norm_does_not_take_is_an_error():
    """`drop_path` was dropped in silence."""
    x = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'shortcut'"):
        jax.eval_shape(option_b().init, jax.random.key(0), x)
    with pytest.raises(UserError, match=r"norm .*WithoutPrecision.* has no field 'dtype', which this network sets"):
        jax.eval_shape(ResNetCIFAR(8, norm=WithoutPrecision).init, jax.random.key(0), x)


def test_weights_of_swapped_parts_have_no_published_names():
    """PyTorch's model would load them and compute something else."""
    assert torch_state.naming(ResNetCIFAR(8)) == "akamaster"
    assert torch_state.naming(classifier.build("resnet_cifar(8, norm='batch_norm')", 4, "float32").backbone) == (
        "akamaster"
    )
    for backbone in (ResNetCIFAR(8, activation=nn.gelu), ResNetCIFAR(8, block=SEBlock)):
        assert torch_state.naming(backbone) == "own"
        with pytest.raises(UserError, match="unknown names of a ResNetCIFAR 'akamaster'"):
            torch_state.naming(backbone, "akamaster")
    assert ResNetCIFAR().block is BasicBlock


def test_a_mistake_in_a_strangers_block_is_shown_where_it_is():
    """The traceback, and no sentence that blames the key."""
    config = default_config()
    config.model = "test_parts:broken"
    recipe = Recipe(config, DataInfo(64, (8, 8, 1), ("a", "b"), ""))
    with pytest.raises(AttributeError, match="no_such_attribute"), diagnose.naming_the_key(recipe):
        jax.eval_shape(lambda: recipe.model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))


def test_what_a_strangers_function_returns_and_cannot_be_used_is_said_of_its_key(monkeypatch):
    """A traceback would end in this package, where nothing is wrong."""
    monkeypatch.setattr("imgclf_jax.run.provenance.own_files", dict)  # the test itself is in the traceback
    config = default_config()
    config.model, config.loss = "mlp", "test_parts:two_values"
    recipe = Recipe(config, DataInfo(64, (8, 8, 1), ("a", "b"), ""))
    says = r"^loss='test_parts:two_values' returns something that the step cannot use: "
    with pytest.raises(UserError, match=says), diagnose.naming_the_key(recipe):
        jax.eval_shape(lambda x: recipe.loss(x, x).sum(), jnp.zeros(3))
    for model in ("test_parts:Numbers", "test_parts:WithNumPy"):  # the optimizer was blamed for NumPy in the model
        config.model = model
        recipe = Recipe(config, DataInfo(64, (8, 8, 1), ("a", "b"), ""))
        with pytest.raises(UserError, match=f"^model='{model}' fails on images"), diagnose.naming_the_key(recipe):
            jax.eval_shape(recipe.model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
