"""`launch.py explain`: its files and output for a trained run."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import imgclf_jax
import launch
from imgclf_jax.data import sources
from imgclf_jax.data.source import read_examples
from imgclf_jax.tools.explain import attribution, explanations


def explained(flags, capsys):
    capsys.readouterr()
    status = launch.main(["explain", "--format=json", *flags])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.thorough
def test_explain(run, photos, capsys):
    """The class and probability of the model, the map of the pure function, and a picture of each image."""
    status, records = explained(["photos", f"--workdir={run}", "--output=heat"], capsys)
    assert status == 0
    model = imgclf_jax.load(run)
    probabilities = model.predict([record["file"] for record in records])
    assert [r["class"] for r in records] == [model.class_names[best] for best in probabilities.argmax(1)]
    assert [r["probability"] for r in records] == pytest.approx(probabilities.max(1).tolist(), abs=1e-6)
    assert {r["method"] for r in records} == {"gradcam"}
    for file in {r["picture"] for r in records}:
        with Image.open(file) as picture:
            assert picture.size[0] > 2 * 256
    assert len({r["picture"] for r in records}) == 6
    # In batches of 8, with a class for each: the maps of the pure function.
    some, labels = read_examples(sources.digits()["test"], np.arange(9))["image"], np.arange(9, dtype=np.int32)
    classifier, augment = model.programs.recipe.model, model.programs.recipe.augment(train=False)
    seen = attribution.inspect(classifier, {"params": model.state.params}, (8, 8, 1))
    pure = attribution.make_gradcam(classifier, augment, attribution.choose_layer(seen))
    found = explanations.build(model)[1](some, labels)
    np.testing.assert_allclose(found, pure(*model.state.evaluated, some, labels), atol=1e-5)


@pytest.mark.thorough
def test_explain_another_class_and_by_occlusion(run, seeds, photos, capsys):
    """For several seeds, the drop of their mean probability. Two images of one name have two figures."""
    for folder in ("x", "y"):
        shutil.copytree(photos / "unknown", photos / folder)
    flags = ["photos/x", "photos/y", f"--workdir={seeds}", "--method=occlusion", "--class=4", "--window=3"]
    status, records = explained(flags, capsys)
    assert status == 0
    assert [r["picture"] for r in records] == ["explained/0.4.occlusion.png", "explained/0.4-2.occlusion.png"]
    model = imgclf_jax.load(seeds)
    image = model.prepare("photos/x/0.png")
    [found] = attribution.occlusion(model.predict, image[None], np.array([4]), 3)
    assert records[0]["greatest"] == pytest.approx(found.max(), abs=1e-5)
    assert records[0]["probability"] == pytest.approx(model.predict(image)[0, 4], abs=1e-6)


def test_an_unknown_layer_names_the_nearest(run, photos, capsys):
    assert launch.main(["explain", "photos", "--layer=block7", f"--workdir={run}"]) == 1
    assert "unknown layer with feature maps 'block7': did you mean 'block0'" in capsys.readouterr().err
