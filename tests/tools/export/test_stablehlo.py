"""Exported files, each by its own runtime, for any number of images: the run's outputs, and those of definitions."""

import datetime
import importlib.util
import io
import json
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from cases import programs
from jax import export
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import load_file, save_file

import imgclf_jax
import launch
from imgclf_jax.core.errors import UserError
from imgclf_jax.models.layers import max_pool
from imgclf_jax.tools.export import command, compared, onnx, saved_model, stablehlo
from imgclf_jax.trained import Trained

# Reads the file by the lines that `export` prints, where this package, and for a SavedModel JAX, cannot be imported.
READER = """
import sys
for name in {missing}:
    sys.modules[name] = None
import numpy as np
{loader}
for n in (1, 5):
    images = np.load("images.npy")[:n]
    np.save(f"{{n}}.npy", {outputs})
print(classes)
"""
PACKAGES = ("imgclf_jax", "flax", "optax")


@pytest.mark.thorough
@pytest.mark.parametrize(("suffix", "gives", "by", "missing", "outputs"), [
    ("stablehlo", "probabilities", "JAX", PACKAGES, "np.asarray(jax.jit(model.call)(images))"),
    *(("savedmodel", gives, "TensorFlow", (*PACKAGES, "jax", "jaxlib"), f"function(images=images)['{gives}'].numpy()")
      for gives in ("probabilities", "logits")),
])  # fmt: skip
def test_the_printed_lines_load_it(seeds, tmp_path, printed, monkeypatch, suffix, gives, by, missing, outputs):
    """Outputs of two seeds, for numbers of images that were not traced."""
    monkeypatch.chdir(tmp_path)
    out = printed("export", f"digits.{suffix}", f"--gives={gives}", f"--workdir={seeds}")
    first, match, until, *_ = out.split("\n")
    assert match.startswith(f"{by}'s outputs match the model's on five random images, up to ")
    assert first.endswith(f"{gives} of uint8 images [b, 8, 8, 1]")
    images = np.random.default_rng(0).integers(256, size=(5, 8, 8, 1), dtype=np.uint8)
    np.save("images.npy", images)
    loader = out.split("\n", 4 if by == "JAX" else 3)[-1]
    command = [sys.executable, "-c", READER.format(loader=loader, missing=missing, outputs=outputs)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout == f"{[str(c) for c in range(10)]}\n"
    for n in (1, 5):
        expected = getattr(imgclf_jax.load(seeds), "logits" if gives == "logits" else "predict")(images[:n])
        np.testing.assert_allclose(np.load(f"{n}.npy"), expected, rtol=1e-5, atol=1e-5)
    if by == "JAX":
        assert said.stderr == ""
        last = (datetime.date.today() + datetime.timedelta(days=180)).isoformat()
        assert last in until
        described = json.loads(zipfile.ZipFile("digits.stablehlo").read("metadata.json"))
        assert (described["images"], described["host_ops"], described["step"]) == (
            {"dtype": "uint8", "shape": ["b", 8, 8, 1]}, "decode(1)", 60)  # fmt: skip
        assert (described["output"]["shape"], described["loads_until"]) == (["b", 10], last)


@pytest.mark.thorough
@pytest.mark.parametrize("gives", ["logits", "features"])
def test_logits_and_features_of_each_seed(seeds, gives):
    model = imgclf_jax.load(seeds)
    content = stablehlo.archive(model, gives, datetime.date(2026, 1, 1))[0]
    assert content == stablehlo.archive(model, gives, datetime.date(2026, 1, 1))[0]  # the same model, the same bytes
    archive = zipfile.ZipFile(io.BytesIO(content))
    exported, described = export.deserialize(bytearray(archive.read("model.stablehlo"))), archive.read("metadata.json")
    images = np.random.default_rng(0).integers(256, size=(3, 8, 8, 1), dtype=np.uint8)
    np.testing.assert_allclose(exported.call(images), getattr(model, gives)(images), rtol=1e-5, atol=1e-5)
    assert json.loads(described)["output"]["shape"] == [2, "b", {"logits": 10, "features": 8}[gives]]


@pytest.mark.thorough
def test_a_file_that_differs_from_the_model_is_not_written(seeds, tmp_path, monkeypatch, capsys):
    lower = stablehlo.lower
    monkeypatch.setattr(stablehlo, "lower", lambda f, *rest: lower(lambda *args: 1.01 * f(*args), *rest))
    assert launch.main(["export", f"{tmp_path}/a.stablehlo", f"--workdir={seeds}", "--gives=logits"]) == 1
    assert "JAX's outputs differ from the model's by up to" in capsys.readouterr().err
    assert not (tmp_path / "a.stablehlo").exists()


WITH_ONNX = all(map(importlib.util.find_spec, ("jax2onnx", "onnxruntime")))
ONNX = pytest.mark.skipif(not WITH_ONNX, reason="of the group `onnx`"), pytest.mark.filterwarnings("ignore")
FORMATS = [".stablehlo", ".savedmodel", pytest.param(".onnx", marks=ONNX), ".safetensors"]
SPECS = {"mlp(widths=(8,))": (8, 1), "cnn(widths=(4, 8), hidden=8)": (28, 1), "rnn": (12, 1), "resnet(18)": (32, 3),
         "resnet_cifar(8)": (16, 3), "wide_resnet(10, 1)": (16, 3), "convnext('T')": (32, 3),
         "vit('Ti', patch=8)": (16, 3), "mixer('S', patch=8)": (16, 3), "airbench": (32, 3)}  # fmt: skip


def made(spec, tta=""):
    """(an untrained model of the spec, images)."""
    size, channels = SPECS[spec]
    untrained = programs((size, size, channels), 5, model=spec, augment="normalize(0.5, 0.25)", tta=tta,
                         preprocess=f"decode({channels})")  # fmt: skip
    recipe = untrained.recipe
    images = np.random.default_rng(1).integers(256, size=(8, size, size, channels), dtype=np.uint8)
    first = None
    if hasattr(recipe.model.backbone, "init_on_images"):
        first = np.asarray(jax.jit(lambda x: recipe.augment(train=False)(None, x))(np.tile(images, (8, 1, 1, 1))))
    return Trained(untrained, untrained.init_state(first), 0), images


def outputs(file, images, names):
    """Of the file's own runtime; PyTorch's is NumPy here."""
    if file.suffix == ".stablehlo":
        return export.deserialize(bytearray(zipfile.ZipFile(file).read("model.stablehlo"))).call(images)
    if file.suffix == ".savedmodel":
        return tf.saved_model.load(file).signatures["serving_default"](images=images)["probabilities"]
    if file.suffix == ".safetensors":
        return probabilities(load_file(file), images)
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["class_names"].split("\n") == [*names]
    return session.run(None, {"images": images})[0]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS[:3])
@pytest.mark.parametrize("spec", SPECS)
def test_every_backbone(spec, suffix, tmp_path, monkeypatch):
    """With TTA views; the file's own runtime and the CPU program agree, for any number of images."""
    model, images = made(spec, "flip")
    monkeypatch.setattr(command, "load_trained", lambda *_: model)
    command.main(model.config, None, [str(tmp_path / f"a{suffix}")], "", "probabilities", "")
    for n in (1, 7):
        found = outputs(tmp_path / f"a{suffix}", images[:n], "01234")
        np.testing.assert_allclose(found, model.predict(images[:n]), rtol=0, atol=1e-5)


def probabilities(w, images):
    """Of cnn(widths=(4,), hidden=5) by PyTorch's Conv2d, MaxPool2d, Flatten and Linear, in float64."""
    x = ((images / 255 - (0.1, 0.5, 0.4)) / (0.3, 0.2, 0.5)).transpose(0, 3, 1, 2)  # [b, c, h, w]
    x = np.einsum("bchwij,fcij->bfhw", sliding_window_view(x, (3, 3), (2, 3)), w["block0.weight"])
    x = np.maximum(x + w["block0.bias"][:, None, None], 0)  # [b, 4, 6, 4]
    x = x.reshape(-1, 4, 3, 2, 2, 2).max((3, 5)).reshape(-1, 24)
    x = np.maximum(x @ w["dense.weight"].T + w["dense.bias"], 0) @ w["head.weight"].T + w["head.bias"]
    return scipy.special.softmax(x, 1)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_computes_its_definition(suffix, tmp_path):
    """From pixels to probabilities, with PyTorch's weights, which `init_from` reads."""
    draw, file, torch = np.random.default_rng(0), tmp_path / f"a{suffix}", tmp_path / "torch.safetensors"
    shapes = {"block0.weight": (4, 3, 3, 3), "dense.weight": (5, 24), "head.weight": (3, 5)}
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    save_file(weights := {name: np.float32(draw.normal(0, 0.4, shape)) for name, shape in shapes.items()}, torch)
    keys = {"init_from": torch, "model": "cnn(widths=(4,), hidden=5)", "data.source": "fake(64, (8, 6, 3), 3)",
            "preprocess": "decode(3)", "augment": "normalize((0.1, 0.5, 0.4), (0.3, 0.2, 0.5))"}  # fmt: skip
    assert launch.main(["export", str(file), *(f"--config.{key}={value}" for key, value in keys.items())]) == 0
    images = draw.integers(256, size=(3, 8, 6, 3), dtype=np.uint8)
    np.testing.assert_allclose(outputs(file, images, "012"), probabilities(weights, images), rtol=1e-5)


def counting(images):
    return images.reshape(len(images), *images.shape[1:])


def test_code_that_counts_the_images_is_told(tmp_path, monkeypatch):
    model, _ = made("mlp(widths=(8,))")
    model.config.augment = f"{__name__}:counting|normalize"
    monkeypatch.setattr(command, "load_trained", lambda *_: model)
    with pytest.raises(UserError, match=r"augment='test_stablehlo:counting.* write x.shape\[0\] instead of len\(x\)"):
        command.main(model.config, None, [str(tmp_path / "a.stablehlo")], "", "probabilities", "")


@pytest.mark.thorough
def test_a_wrong_translation_of_a_network_that_is_sure_is_found():
    """Both are confident about every random image, so their probabilities agree to six digits."""
    model, _ = made("mlp(widths=(8,))")
    params = model.state.params
    head = params["head"] | {"kernel": params["head"]["kernel"] * 0, "bias": params["head"]["bias"] * 0}

    def sure(bias):
        own = head | {"bias": head["bias"].at[:].set(np.float32(bias))}
        return model._replace(state=model.state.replace(params=params | {"head": own}))

    def run(other):
        def outputs(images):
            padded = np.zeros((8, *images.shape[1:]), np.uint8)
            padded[: len(images)] = images
            return np.asarray(other.programs.inference("predict")(*other.state.evaluated, padded))[: len(images)]

        return outputs

    right, wrong = sure([40, 3, 2, 1, 0]), sure([40, 0, 3, 2, 1])
    probabilities = [np.asarray(m.predict(np.zeros((2, 8, 8, 1), np.uint8))) for m in (right, wrong)]
    np.testing.assert_allclose(*probabilities, atol=1e-6)
    assert compared.difference(run(right), right, "predict", "X") == 0
    with pytest.raises(UserError, match=r"^export: X's log probabilities differ from the model's by up to 3, "):
        compared.difference(run(wrong), right, "predict", "X")
    with pytest.raises(UserError, match="by up to nan"):
        compared.difference(lambda images: np.full((len(images), 5), np.nan, np.float32), right, "predict", "X")


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


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.thorough
def test_one_that_is_there_is_replaced_once_the_new_one_is_right(seeds, tmp_path, monkeypatch, capsys):
    model, folder = imgclf_jax.load(seeds), tmp_path / "a.savedmodel"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert launch.main(["export", str(folder), f"--workdir={seeds}"]) == 1
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
