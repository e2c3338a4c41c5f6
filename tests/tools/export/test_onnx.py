"""A model as ONNX: onnxruntime reproduces the run's outputs, for any number of images and every backbone."""

import importlib.util

import jax
import numpy as np
import pytest
from test_stablehlo import SPECS, made

import launch
from imgclf_jax import config as configs
from imgclf_jax.models import classifier
from imgclf_jax.tools.export import onnx

INSTALLED = all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not INSTALLED, reason="jax2onnx and onnxruntime come with the group `onnx`")


@needs_onnx
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


@pytest.mark.skipif(INSTALLED, reason="it is installed")
def test_what_is_missing_is_said_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "config.json").write_text(configs.to_json(configs.default_config()))
    assert launch.main(["export", f"--workdir={tmp_path}", str(tmp_path / "a.onnx")]) == 1
    assert "a.onnx needs jax2onnx, onnxruntime, which are not installed; run it by `uv run --group onnx" in (
        capsys.readouterr().err
    )


def test_convolutions_pad_as_onnx_allows():
    """ONNX's Conv takes no negative padding; `cnn` crops what fills no pooling window."""
    model, images = classifier.build("cnn(widths=(4, 8), hidden=8)", 2, "float32"), np.zeros((2, 29, 28, 1), np.float32)
    variables = model.init(jax.random.key(0), images, train=False)
    flat = onnx._flatten(lambda x: model.apply(variables, x, train=False), jax.typeof(images))
    jaxpr = jax.make_jaxpr(flat)(images)
    pads = [e.params["padding"] for e in jaxpr.jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    assert len(pads) == 2
    assert np.min(pads) >= 0


@pytest.mark.parametrize(("channels", "padding"), [(3, 0), (3, 1)])
def test_the_flattened_function_is_the_same(channels, padding):
    """Calls are inlined, dead operations dropped, padding and pooling rewritten; the values stay."""
    from imgclf_jax.models.layers import max_pool

    @jax.jit
    def inner(x):
        jax.random.split(jax.random.key(0))  # nothing depends on it
        return max_pool(jax.numpy.pad(x, ((0, 0), (1, 2), (0, 0), (0, 1))), 3, 2, padding) * 2

    x = np.random.default_rng(0).standard_normal((2, 9, 8, channels)).astype(np.float32)
    flat = onnx._flatten(lambda x: inner(x) - 1, jax.ShapeDtypeStruct(x.shape, x.dtype))
    np.testing.assert_array_equal(flat(x), inner(x) - 1)
    names = {e.primitive.name for e in jax.make_jaxpr(flat)(x).jaxpr.eqns}
    assert "random_split" not in names
