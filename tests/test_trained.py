"""A trained model as a library: images of any kind in, probabilities, logits and features out."""

import io
import itertools
import json

import numpy as np
import pytest
from flax import linen as nn
from PIL import Image
from scipy.special import log_softmax

import imgclf_jax
import launch
from imgclf_jax import losses, step
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.trained import is_finite

pytestmark = pytest.mark.usefixtures("one_device")

FLAGS = ["--config.total=30 steps", "--config.model=mlp(widths=(16, 8))", "--config.schedule=constant(1e-2)",
         "--config.eval_every="]  # fmt: skip
COUNT = 130  # more than a batch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("digits") / "run"
    assert launch.main([*FLAGS, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def model(run):
    return imgclf_jax.load(run)


@pytest.fixture(scope="module")
def pixels():
    return sources.digits()["test"].read(np.arange(COUNT))["image"]  # uint8[n, 8, 8, 1]


def test_features_logits_and_probabilities_follow_from_each_other(model, pixels):
    """The head's own arrays and a softmax, in float64, lead from one to the next."""
    features, logits, probabilities = (f(pixels) for f in (model.features, model.logits, model.predict))
    assert (features.shape, logits.shape, probabilities.shape) == ((COUNT, 8), (COUNT, 10), (COUNT, 10))
    assert all(x.dtype == np.float32 for x in (features, logits, probabilities))
    head = {name: np.asarray(x, np.float64) for name, x in model.state.params["head"].items()}
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.log(probabilities), log_softmax(logits.astype(np.float64), -1), rtol=1e-5, atol=1e-4)
    assert (model.config.model, model.step, model.class_names) == ("mlp(widths=(16, 8))", 30, tuple("0123456789"))


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_orders_saturated_probabilities(seeds):
    """Of several seeds, the log-odds of their mean probability, in float64."""
    logits = np.array([[18.0, 40, 30, 17, -3], [19, 20, 35, 16, -1]], np.float32)[:seeds, None]  # [seeds, 1, 5]
    infer = step.make_inference("ranked", Constant(), lambda _, x: x, num_seeds=seeds, link=losses.SIGMOID)
    p, ranking = infer({"logits": logits if seeds > 1 else logits[0]}, {}, np.zeros((1, 2, 2, 1)))
    np.testing.assert_allclose(p, (1 / (1 + np.exp(-logits.astype(float)))).mean(0), rtol=1e-6)
    odds = (1 / (1 + np.exp(-logits.astype(float)))).mean(0) / (1 / (1 + np.exp(logits.astype(float)))).mean(0)
    np.testing.assert_allclose(ranking, np.log(odds), rtol=1e-5)
    assert len({*p[0, :3].tolist()}) == 1


class Constant(nn.Module):
    """The logits that its parameters hold."""

    @nn.compact
    def __call__(self, images, train=False):
        return self.param("logits", nn.initializers.zeros, (1, 5))


def test_an_image_may_be_a_file_bytes_pixels_or_pillows(model, pixels, tmp_path):
    expected = model.predict(pixels[:1])
    picture = Image.fromarray(pixels[0, ..., 0])
    picture.save(tmp_path / "a.png")
    content = io.BytesIO()
    picture.convert("RGB").save(content, "PNG")
    for image in (str(tmp_path / "a.png"), tmp_path / "a.png", content.getvalue(), pixels[0], pixels[0, ..., 0],
                  picture, picture.convert("RGBA")):  # fmt: skip
        np.testing.assert_array_equal(model.predict([image]), expected)
        np.testing.assert_array_equal(model.predict(image), expected)


def test_an_image_that_cannot_be_used_is_named(model, pixels, tmp_path):
    (tmp_path / "b.png").write_bytes(b"no image")
    for images, message in [
        ([pixels[0], tmp_path / "b.png"], "b.png: the image is in none of the formats"),
        ([pixels[0], pixels[0].astype(np.float32)], "image 1: the image is float32"),
        ([tmp_path / "c.png"], "c.png: No such file"),
        ([], "predict got no images; pass one or more"),
    ]:
        with pytest.raises(UserError, match=message):
            model.predict(images)
    good, bad, after = model.stream("predict", [pixels[0], tmp_path / "b.png", pixels[0]])
    assert isinstance(bad, UserError)
    np.testing.assert_array_equal(good, after)


def test_a_stream_may_be_endless_and_keeps_its_order(model, pixels):
    """Only a few batches are held, whatever comes after them."""
    taken = []

    def images():
        for i in itertools.count():
            taken.append(i)
            yield pixels[i % COUNT]

    stream = model.stream("logits", images())
    first = np.stack(list(itertools.islice(stream, 3 * COUNT)))
    stream.close()
    expected = model.logits(pixels)
    np.testing.assert_array_equal(first, np.concatenate([expected] * 3))
    assert len(taken) <= 3 * COUNT + 6 * 128


def test_outputs_that_are_not_finite():
    """Infinite logits rule classes out; an infinite feature or probability is a fault."""
    nan, infinite = np.array([1.0, np.nan]), np.array([1.0, -np.inf])
    assert not any(is_finite(nan, what) for what in ("logits", "features", "predict"))
    assert is_finite(infinite, "logits")
    assert not is_finite(infinite, "features")
    assert is_finite(np.array([[0.0, 1.0], [-np.inf, 3.0]]), "ranked")  # probabilities, and logits that order them


def test_code_that_a_run_names_is_not_imported(run, tmp_path):
    text = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(text | {"model": "os:system('true')"}))
    with pytest.raises(UserError, match="would import the module 'os'"):
        imgclf_jax.load(tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        imgclf_jax.load(tmp_path / "nothing")
