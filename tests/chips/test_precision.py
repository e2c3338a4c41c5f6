"""The dtypes of matmuls and sums in a bfloat16 training step of each backbone, on GPU and TPU."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from cases import thorough

from imgclf_jax.core import jaxprs, platform
from imgclf_jax.models import classifier, resnet
from imgclf_jax.models.backbones import BACKBONES

SPECS = {
    "cnn": "cnn(widths=(4, 8), hidden=8)",
    "mlp": "mlp(widths=(16,))",
    "vit": "vit('Ti', patch=8)",
    "mixer": "mixer('S', patch=8)",
}  # fmt: skip; the others by their names
# (lhs, rhs, result). The units for bfloat16 sum in float32; "bfloat16" as a result says that the sum is rounded once.
ROUNDED, WHOLE = ("bfloat16", "bfloat16", "bfloat16"), ("bfloat16", "bfloat16", "float32")
HEAD = {("float32", "float32", "float32"): 3}  # logits, and two gradients
# The products of queries and keys in a ViT's two blocks: softmax takes their sums as they are.
NOT_ROUNDED = {"vit": {WHOLE: 2}}
# Gradients that are summed in bfloat16: that of the max-pool whose windows overlap, of at most four terms on TPU.
SUMMED_IN_BFLOAT16 = {("resnet", "tpu"): {"select_and_scatter_add": 1}}
SUMS = ("reduce_sum", "reduce_window_sum", "cumsum", "scatter-add", "select_and_scatter_add")


@pytest.mark.parametrize("form", ["tpu", *thorough("gpu")])
@pytest.mark.parametrize("name", ["resnet", "vit", *thorough(*sorted({*BACKBONES} - {"resnet", "vit", "rnn"}))])
def test_products_of_bfloat16_operands(name, form, shallow, monkeypatch):
    """All of the backbone, with the head in float32. Sums of many terms are in float32, except for those above."""
    monkeypatch.setitem(resnet._STAGES, 50, (1, 1))
    with platform.tracing_for(form):
        step = gradient(classifier.build(SPECS.get(name, name), 10, "bfloat16"))
    products, sums = Counter(), Counter()
    for equation in equations(step):
        dtypes = tuple(str(v.aval.dtype) for v in (*equation.invars[:2], *equation.outvars[:1]))
        if equation.primitive.name in ("dot_general", "conv_general_dilated", "dot_product_attention_fwd"):
            products[dtypes] += 1
        elif equation.primitive.name in SUMS and dtypes[0] == "bfloat16":
            sums[equation.primitive.name] += many_terms(equation)
    exceptions = HEAD | NOT_ROUNDED.get(name, {})
    assert {dtypes: n for dtypes, n in products.items() if dtypes != ROUNDED} == exceptions
    assert products[ROUNDED] > 0
    assert +sums == SUMMED_IN_BFLOAT16.get((name, form), {})


def many_terms(equation):
    """Whether a sum has more than one term; a max-pool without overlapping windows has one."""
    return "window_strides" not in equation.params or (
        equation.params["window_dimensions"] != equation.params["window_strides"]
    )


def gradient(model):
    """The jaxpr of the gradient of a loss, in training."""
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    others = {k: v for k, v in variables.items() if k != "params"}

    def loss(params, others, images):
        keys = {"dropout": jax.random.key(0)}
        logits, _ = model.apply({"params": params, **others}, images, train=True, mutable=list(others), rngs=keys)
        return jnp.mean(logits**2)

    return jax.make_jaxpr(jax.grad(loss))(variables["params"], others, images)


def equations(jaxpr):
    """All equations of a jaxpr and those inside it."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in jaxprs.inner(equation):
            yield from equations(inner)
