"""Both forms of every backbone, CPU and accelerator: equal, open to edits, and differentiable in both modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from flax import linen as nn

from imgclf_jax.core import platform, tree
from imgclf_jax.models import classifier
from imgclf_jax.models.backbones import BACKBONES

FORMS = ("cpu", "gpu")
# Each at a size that compiles in seconds, with every kind of layer of its family; the last is a module in its middle.
SMALL = {
    "cnn": ("cnn(widths=(4, 8), hidden=8)", 16, "block0"),
    "mlp": ("mlp(widths=(16, 16), dropout=0.1)", 8, "dense0"),
    "rnn": ("rnn(features=8, layers=2)", 8, "rnn0"),
    "resnet": ("resnet(depth=18, zero_init=False)", 32, "layer2_0"),
    "resnet_cifar": ("resnet_cifar(depth=8)", 16, "layer2_0"),
    "wide_resnet": ("wide_resnet(depth=10, width=1, dropout=0.1)", 16, "layer2_0"),
    "convnext": ("convnext('T', drop_path=0.1, layer_scale=0.1)", 32, "stage1_0"),
    "efficientnet": ("efficientnet(drop_path=0.1, dropout=0.1)", 16, "stage1_0"),
    "mobilenet": ("mobilenet('V4-S', drop_path=0.1)", 16, "stage1_1"),
    "regnety": ("regnety", 16, "stage2_1"),
    "squeezenet": ("squeezenet(dropout=0.1)", 32, "fire3"),
    "vit": ("vit('Ti', patch=8, drop_path=0.1, dropout=0.1)", 16, "block0"),
    "mixer": ("mixer('S', patch=8, drop_path=0.1)", 16, "block0"),
    "airbench": ("airbench(widths=(8, 8, 40))", 32, "group1"),
}


pytestmark = pytest.mark.usefixtures("shallow")


class Edits(nn.Module):
    """Ordinary operations that a user may insert between two layers, on the usual axes."""

    @nn.compact
    def __call__(self, x, train):
        kernel = (3,) * (x.ndim - 2)
        settings = {"dtype": x.dtype, "param_dtype": x.dtype}
        y = jnp.concatenate([nn.softmax(x), x * jnp.mean(x, -1, keepdims=True)], axis=-1)
        y = nn.Conv(x.shape[-1], kernel, **settings)(y) if kernel else nn.Dense(x.shape[-1], **settings)(y)
        y = nn.BatchNorm(use_running_average=not train, force_float32_reductions=False, **settings)(y)
        y = nn.gelu(nn.GroupNorm(num_groups=2, force_float32_reductions=False, **settings)(y))
        squeezed = jnp.mean(y, range(1, x.ndim - 1))  # squeeze and excitation
        y = y * nn.sigmoid(nn.Dense(x.shape[-1], **settings)(squeezed)).reshape(-1, *[1] * len(kernel), x.shape[-1])
        keep = jnp.asarray([1.25, 0, 1.25, 1.25], x.dtype).reshape(-1, *[1] * (x.ndim - 1))  # stochastic depth
        return x + y * keep


class Edited(nn.Module):
    """A backbone with the edits after the module of this name."""

    backbone: nn.Module
    place: str

    @nn.compact
    def __call__(self, x, train=False):
        edits = Edits(name="edits")

        def after(call, args, kwargs, context):
            out = call(*args, **kwargs)
            here = context.method_name == "__call__" and context.module.path[-1:] == (self.place,)
            return edits(out, train) if here else out

        with nn.intercept_methods(after):
            return self.backbone(x, train=train)


def random_variables(model, x):
    """Random parameters in the dtype of the images, those of one axis around one; running statistics of one."""
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda s: (rng.normal(size=s.shape) / 3 + (len(s.shape) == 1)).astype(x.dtype), shapes)
    return {k: v if k == "params" else jax.tree.map(np.ones_like, v) for k, v in variables.items()}


def build(name, precision="float64", edited=False):
    """(function of the parameters → logits of four images in training, parameters)."""
    spec, size, place = SMALL[name]
    model = classifier.build(spec, 4, precision)
    if edited:
        model = classifier.Classifier(Edited(model.backbone, place), 4)
    dtype = np.float64 if precision == "float64" else np.float32
    model = model.clone(dtype=dtype)
    x = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(dtype)
    variables = random_variables(model, x)
    others = {k: v for k, v in variables.items() if k != "params"}

    def logits(params):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply({"params": params, **others}, x, train=True, mutable=list(others), rngs=rngs)[0]

    return logits, variables["params"]


def assert_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), found, expected)


QUICK = ["cnn"]  # the others take ten seconds to compile when they are differentiated in both modes


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [*QUICK, *thorough(*sorted({*BACKBONES} - {*QUICK}))])
def test_both_forms_are_equal_and_differentiable_with_ordinary_edits_in_the_middle(name):
    """Logits, gradients, `jax.jvp` of both; each form against the other and against differences, in float64.

    The edits: concatenation, softmax, means, stochastic depth, nn.Conv, BatchNorm, GroupNorm, squeeze and excitation.
    """
    logits, params = build(name, edited=True)
    assert any("edits" in path for path, _ in tree.named_leaves(params))
    rng = np.random.default_rng(2)
    direction, other = (jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(2))

    def value(params):
        return jnp.sum(jnp.sin(y := logits(params))), y

    def along(tangent, gradient):
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(tangent), jax.tree.leaves(gradient), strict=True))

    def derivatives(params, direction, other):
        """(Logits, gradient), the value and the gradient along `other`, the derivatives of both along `direction`."""
        run = jax.value_and_grad(value, has_aux=True)
        ((out, y), gradient), ((first, _), change) = jax.jvp(run, (params,), (direction,))
        return (y, gradient), (out, along(other, gradient)), (first, along(direction, gradient), along(other, change))

    runs = {form: jax.jit(platform.tracing_for(form)(derivatives)) for form in FORMS}
    # So small that hardly a ReLU changes its side, and large beside the rounding of float64.
    step, moved = 3e-8, lambda s: jax.tree.map(lambda p, d: p + s * d, params, direction)
    above, below = (runs["gpu"](moved(s), direction, other)[1] for s in (step, -step))
    expected = [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]
    found = {form: runs[form](params, direction, other) for form in FORMS}
    assert_equal(*(found[f][0] for f in FORMS))
    for form in FORMS:
        first, reverse, second = found[form][2]
        np.testing.assert_allclose([first, reverse], expected[0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(second, expected[1], rtol=1e-4, atol=1e-5)
    linear = platform.tracing_for("cpu")(lambda params, d: jax.linearize(value, params, has_aux=True)[1](d))  # traced
    jax.eval_shape(linear, params, direction)


@pytest.mark.parametrize(
    "name", ["cnn", "resnet_cifar", "vit", *thorough(*sorted({*BACKBONES} - {"cnn", "resnet_cifar", "vit"}))]
)
def test_programs_for_accelerators_hold_nothing_of_the_cpu(name):
    """They have no barrier and no primitive of this project, and can be lowered here. bfloat16 stays between layers."""
    logits, params = build(name, "bfloat16")
    program = jax.jit(platform.tracing_for("gpu")(jax.grad(lambda params: jnp.sum(logits(params))))).trace(params)
    text = str(program.jaxpr)
    assert "optimization_barrier" not in text
    assert "cpu_" not in text
    assert "bf16[" in text
    with jax.numpy_dtype_promotion("standard"):  # which JAX's own lowering of matmuls with a precision needs
        program.lower(lowering_platforms=("cuda",))
