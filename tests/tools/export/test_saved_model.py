"""A model as a SavedModel: TensorFlow alone runs it for any number of images and reproduces the run's outputs."""

import datetime
import json
import subprocess
import sys

import numpy as np
import pytest
from test_stablehlo import run  # noqa: F401

import imgclf_jax
import launch
from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.export import saved_model

# Reads the folders by the lines that `export` prints, where neither this package nor JAX can be imported.
pytestmark = pytest.mark.usefixtures("one_device")

READER = """
import sys
for name in ("imgclf_jax", "jax", "jaxlib", "flax"):
    sys.modules[name] = None
import numpy as np
{loader}
images = np.load("images.npy")
for name in sys.argv[1:]:
    output = name.partition(".")[0]
    function = tf.saved_model.load(name).signatures["serving_default"]
    for n in (1, 5):
        np.save(f"{{output}}{{n}}.npy", function(images=images[:n])[output].numpy())
print(classes)
"""


@pytest.mark.thorough
def test_the_printed_lines_load_it_without_this_package_and_jax(run, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Probabilities of the ensemble of two seeds, and the logits of each, for one image and for five."""
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert launch.main(["export", "probabilities.savedmodel", f"--workdir={run}"]) == 0
    _, second, _, loader = capsys.readouterr().out.split("\n", 3)
    assert second.startswith("TensorFlow's outputs match the model's on five random images, up to ")
    assert launch.main(["export", "logits.savedmodel", "--gives=logits", f"--workdir={run}"]) == 0
    images = np.random.default_rng(0).integers(256, size=(5, 28, 28, 1), dtype=np.uint8)
    np.save("images.npy", images)
    folders = ["probabilities.savedmodel", "logits.savedmodel"]
    command = [sys.executable, "-c", READER.format(loader=loader), *folders]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert printed == f"{[str(c) for c in range(10)]}\n"
    model = imgclf_jax.load(run)
    for n in (1, 5):
        np.testing.assert_allclose(np.load(f"probabilities{n}.npy"), model.predict(images[:n]), rtol=0, atol=1e-5)
        logits = np.load(f"logits{n}.npy")
        assert logits.shape == (2, n, 10)
        np.testing.assert_allclose(logits, model.logits(images[:n]), rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_one_that_is_there_is_replaced_once_the_new_one_is_right(run, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Another folder stays."""
    model, folder = imgclf_jax.load(run), tmp_path / "a.savedmodel"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert launch.main(["export", str(folder), f"--workdir={run}"]) == 1
    assert "exists and is not a SavedModel" in capsys.readouterr().err
    (folder / "saved_model.pb").write_text("")
    today = datetime.date(2026, 1, 1)
    with monkeypatch.context() as patch:
        patch.setitem(saved_model.compared._CLOSE, "float32", -1.0)  # as if TensorFlow computed something else
        with pytest.raises(UserError, match="TensorFlow's outputs differ"):
            saved_model.write(model, "features", folder, today)
    assert (folder / "thesis.txt").exists()
    saved_model.write(model, "features", folder, today)
    assert not (folder / "thesis.txt").exists()
    assert json.loads((folder / "assets.extra" / "metadata.json").read_text())["gives"] == "features"
    assert list(tmp_path.iterdir()) == [folder]
