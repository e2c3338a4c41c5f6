"""Both forms of every backbone, CPU and accelerator: equal, and differentiable in both modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough

from imgclf_jax.core import platform
from imgclf_jax.core.jaxprs import matmul_flops
from imgclf_jax.models import classifier
from imgclf_jax.models.backbones import BACKBONES

FORMS = ("cpu", "gpu")
# Each at a size that compiles in seconds, with every kind of layer of its family.
SMALL = {
    "cnn": ("cnn(widths=(4, 8), hidden=8)", 16),
    "mlp": ("mlp(widths=(16, 16), dropout=0.1)", 8),
    "rnn": ("rnn(features=8, layers=2)", 8),
    "resnet": ("resnet(depth=18, zero_init=False)", 32),
    "resnet_cifar": ("resnet_cifar(depth=8)", 16),
    "wide_resnet": ("wide_resnet(depth=10, width=1, dropout=0.1)", 16),
    "convnext": ("convnext('T', drop_path=0.1, layer_scale=0.1)", 32),
    "efficientnet": ("efficientnet(drop_path=0.1, dropout=0.1)", 16),
    "mobilenet": ("mobilenet('V4-S', drop_path=0.1)", 16),
    "regnety": ("regnety", 16),
    "squeezenet": ("squeezenet(dropout=0.1)", 32),
    "vit": ("vit('Ti', patch=8, drop_path=0.1, dropout=0.1)", 16),
    "mixer": ("mixer('S', patch=8, drop_path=0.1)", 16),
    "airbench": ("airbench(widths=(8, 8, 40))", 32),
}


pytestmark = pytest.mark.usefixtures("shallow")


def random_variables(model, x):
    """Random parameters in the dtype of the images, those of one axis around one; running statistics of one."""
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda s: (rng.normal(size=s.shape) / 3 + (len(s.shape) == 1)).astype(x.dtype), shapes)
    return {k: v if k == "params" else jax.tree.map(np.ones_like, v) for k, v in variables.items()}


def build(name, precision="float64"):
    """(function of the parameters → logits of four images in training, parameters)."""
    spec, size = SMALL[name]
    model = classifier.build(spec, 4, precision)
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
def test_both_forms_are_equal_and_differentiable(name):
    """Logits, gradients, `jax.jvp` of both; each form against the other and against differences, in float64."""
    logits, params = build(name)
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


@pytest.mark.parametrize("name", ["cnn", "resnet_cifar", *thorough(*sorted({*BACKBONES} - {"cnn", "resnet_cifar"}))])
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


@pytest.fixture
def twice(request, monkeypatch):
    """(Function of the parameters → logits, parameters) without and with it."""
    name, precision = request.param
    plain = build(name, precision)
    text, *more = SMALL[name]
    monkeypatch.setitem(SMALL, name, (text.replace(")", ", remat='block')"), *more))
    return plain, build(name, precision)


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.parametrize("twice", [(n, "float64") for n in ("convnext", "mixer", "resnet", "vit")], indirect=True)
def test_the_gradients_are_the_same(twice):
    """In both forms, also with dropout and stochastic depth; parameters keep their names."""
    (plain, params), (again, same) = twice
    assert jax.tree.structure(params) == jax.tree.structure(same)
    for form in FORMS:
        expected, ours = (
            jax.jit(platform.tracing_for(form)(jax.value_and_grad(lambda p, f=f: jnp.sum(jnp.sin(f(p))))))(params)
            for f in (plain, again)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), ours, expected)


@pytest.mark.parametrize(
    "twice", [("resnet", "float32"), *thorough((("vit", "float32"),), (("convnext", "float32"),))], indirect=True
)
def test_forward_products_are_computed_again(twice):
    """At most once: a third more matmuls in a gradient, less where a block's last matmul is not needed."""
    (plain, params), (again, _) = twice
    before, after = (
        matmul_flops(jax.make_jaxpr(platform.tracing_for("gpu")(jax.grad(lambda p, f=f: jnp.sum(f(p)))))(params))
        for f in (plain, again)
    )
    assert 1.1 < after / before < 4 / 3 + 0.02
