"""A model as ONNX: onnxruntime reproduces the run's outputs, for any number of images and every backbone."""

import importlib.util

import jax
import numpy as np
import pytest
from test_stablehlo import SPECS, made

from imgclf_jax.models.layers import max_pool
from imgclf_jax.tools.export import onnx


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("jax2onnx", "onnxruntime"))), reason="of the group `onnx`")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of jax2onnx
@pytest.mark.parametrize("spec", SPECS)
def test_every_backbone(spec):
    import onnxruntime

    model, images = made(spec)
    content, difference = onnx.archive(model, "predict")
    assert difference < 1e-5
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for n in (1, 7):
        [found] = session.run(None, {"images": images[:n]})
        np.testing.assert_allclose(found, model.predict(images[:n]), rtol=0, atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map["class_names"].split("\n") == list("abcde")


@pytest.mark.parametrize(("channels", "padding"), [(3, 0), (3, 1)])
def test_the_flattened_function_is_the_same(channels, padding):
    """Calls are inlined, dead operations dropped, padding and pooling rewritten; the values stay."""

    @jax.jit
    def inner(x):
        jax.random.split(jax.random.key(0))  # nothing depends on it
        return max_pool(jax.numpy.pad(x, ((0, 0), (1, 2), (0, 0), (0, 1))), 3, 2, padding) * 2

    x = np.random.default_rng(0).standard_normal((2, 9, 8, channels)).astype(np.float32)
    flat = onnx._flatten(lambda x: inner(x) - 1, jax.ShapeDtypeStruct(x.shape, x.dtype))
    np.testing.assert_array_equal(flat(x), inner(x) - 1)
    names = {e.primitive.name for e in jax.make_jaxpr(flat)(x).jaxpr.eqns}
    assert "random_split" not in names
