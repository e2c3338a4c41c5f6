"""Inference keeps weights in the dtype that its program reads them in, and predicts the same."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough

from imgclf_jax.core import narrow, sharding
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo

NETWORKS = ["resnet_cifar(8)", *thorough("vit('Ti', patch=8)", "convnext('T')", "cnn()", "mlp(widths=(8,))")]


def bf16(x):
    return x.astype(jnp.bfloat16)


def matmul(x, w):
    return bf16(x) @ bf16(w)


with_derivative = jax.custom_jvp(matmul)
with_derivative.defjvps(None, None)

CASES = {
    "a matmul": (matmul, "bfloat16"),
    "two matmuls": (lambda x, w: matmul(x, w) + matmul(x, w.T), "bfloat16"),
    "moved first": (lambda x, w: bf16(x) @ bf16(w).reshape(2, 2, 4).transpose(2, 0, 1).reshape(4, 4), "bfloat16"),
    "inside jit": (lambda x, w: jax.jit(matmul)(x, w), "bfloat16"),
    "inside a custom derivative": (lambda x, w: with_derivative(x, w), "bfloat16"),
    "a convolution": (
        lambda x, w: jax.lax.conv(bf16(x)[None, :, None], bf16(w)[..., None, None], (1, 1), "SAME"), "bfloat16"
    ),
    "a matmul in float32": (lambda x, w: x @ w, "float32"),
    "a matmul of two precisions": (lambda x, w: (matmul(x, w), x @ w), "float32"),
    "a penalty too": (lambda x, w: (matmul(x, w), jnp.sum(w * w)), "float32"),
    "a penalty inside jit": (lambda x, w: (matmul(x, w), jax.jit(lambda w: jnp.sum(w * w))(w)), "float32"),
    "added": (lambda x, w: bf16(x) + bf16(w), "float32"),
    "returned": (lambda x, w: (matmul(x, w), w), "float32"),
    "rounded to integers": (lambda x, w: x.astype(jnp.int8) @ w.astype(jnp.int8), "float32"),
    "truncated to integers": (lambda x, w: bf16(x) @ bf16(w.astype(jnp.int8)), "float32"),
    "rounded twice": (lambda x, w: bf16(x) @ bf16(w.astype(jnp.float16)), "float32"),
    "for each seed": (lambda x, w: jax.lax.map(lambda w: matmul(x, w), w[None]), "bfloat16"),
    "recomputed": (jax.checkpoint(matmul), "bfloat16"),
    "carried by a loop": (lambda x, w: jax.lax.scan(lambda w, _: (w, matmul(x, w)), w, length=2), "float32"),
    "in a loop": (lambda x, w: jax.lax.fori_loop(0, 2, lambda _, y: matmul(y, w), bf16(x)), "bfloat16"),
    "in a loop of unknown length": (
        lambda x, w: jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: matmul(y, w), bf16(x)), "float32"
    ),
    "not at all": (lambda x, w: x, "float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_weights_are_narrowed_only_where_matmuls_alone_read_them(name):
    function, expected = CASES[name]
    x, w = np.float32([[1, 2, 3, 4]] * 4), np.arange(16, dtype=np.float32).reshape(4, 4)
    assert narrow.read_dtypes(jax.make_jaxpr(function)(x, w))[1] == expected


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("precision", ["bfloat16", *thorough("float32")])
def test_predictions_stay_the_same(model, precision, fake_config, monkeypatch):
    fake_config.model, fake_config.precision, fake_config.augment = model, precision, "normalize"
    data = DataInfo(64, (32, 32, 3), ("a", "b", "c"), "data")
    programs = Programs(Recipe(fake_config, data), sharding.make_mesh())
    weights = programs.init_state().evaluated
    images = np.random.default_rng(0).integers(0, 256, (8, *data.image_shape), np.uint8)
    passed, keep_narrowed = [], narrow.keep_narrowed

    def spied(jitted):
        def call(*args):
            passed[:] = args
            return jitted(*args)

        call.trace = jitted.trace
        return keep_narrowed(call)

    monkeypatch.setattr(narrow, "keep_narrowed", spied)
    with programs.caching(onednn=True):
        out = programs.logits(*weights, images)
        rounded = jax.tree.map(lambda x: x.astype(jnp.float32), tuple(passed[:2]))  # where XLA omits their rounding
        plain = programs.logits.__wrapped__(*rounded, images)
    ulp = 2.0**-8 if precision == "bfloat16" else 0
    np.testing.assert_allclose(out, plain, rtol=0, atol=ulp * np.abs(plain).max())
    kernels = [x.dtype for x in jax.tree.leaves(passed[0]["backbone"]) if x.ndim > 1]
    assert (jnp.bfloat16 in kernels) == (precision == "bfloat16")
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((passed[0]["head"], passed[1])))


def test_the_kept_weights_are_those_of_the_call_and_end_with_them():
    calls = []

    def infer(params, model_state, batch):
        return matmul(batch, params["w"]) + model_state["shift"]

    shapes = {"w": jax.ShapeDtypeStruct((4, 4), "float32")}, {"shift": jax.ShapeDtypeStruct((), "bfloat16")}
    jitted = jax.jit(narrow.accept_narrow(infer, shapes))

    def spied(params, model_state, batch):
        calls.append(params["w"])
        return jitted(params, model_state, batch)

    spied.trace = jitted.trace
    call, state, x = narrow.keep_narrowed(spied), {"shift": jnp.bfloat16(1)}, jnp.ones((2, 4))
    first, second = ({"w": jnp.full((4, 4), value, jnp.float32)} for value in (1, 2))
    for params in (first, second, first):
        np.testing.assert_array_equal(call(params, state, x), jitted(params, state, x))
    call(first, state, x)
    call(first, state, jnp.ones((3, 4)))  # another batch size reads the same
    assert all(w.dtype == jnp.bfloat16 for w in calls)
    assert calls[2] is calls[3] is calls[4]
    call({"w": np.ones((4, 4), np.float32)}, state, x)  # may change in place, so it is not kept
    assert calls.pop().dtype == np.float32

    del calls[:], params, first, second
    gc.collect()
    assert not [x for x in jax.live_arrays() if x.shape == (4, 4)]
