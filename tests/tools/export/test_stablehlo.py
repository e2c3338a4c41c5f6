"""A model as StableHLO or ONNX: other programs run the file for any number of images and give the run's outputs."""

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
from jax import export

import imgclf_jax
import launch
from imgclf_jax.config import default_config
from imgclf_jax.core.errors import UserError
from imgclf_jax.models.layers import max_pool
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.tools.export import compared, onnx, stablehlo
from imgclf_jax.trained import Trained

FLAGS = ["--config.total=20 steps", "--config.model=mlp(widths=(8,))", "--config.schedule=constant(1e-2)",
         "--config.eval_every="]  # fmt: skip
# Reads the file by the lines that `export` prints, where this package cannot be imported.
READER = """
import sys
sys.modules["imgclf_jax"] = sys.modules["flax"] = sys.modules["optax"] = None
import numpy as np
{loader}
images = np.load(sys.argv[1])
np.save(sys.argv[2], np.asarray(jax.jit(model.call)(images)))
print(classes)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("digits") / "run"
    assert launch.main([*FLAGS, f"--workdir={workdir}", "--config.num_seeds=2"]) == 0
    return workdir


@pytest.mark.thorough
def test_the_printed_lines_load_it_without_this_package(run, tmp_path, capsys):
    """Probabilities of the ensemble of two seeds, for a number of images that was not traced."""
    file = tmp_path / "digits.stablehlo"
    capsys.readouterr()
    assert launch.main(["export", str(file), f"--workdir={run}"]) == 0
    out = capsys.readouterr().out
    first, match, until, _, loader = out.split("\n", 4)
    assert match.startswith("JAX's outputs match the model's on five random images, up to ")
    assert first.endswith("probabilities of uint8 images [b, 28, 28, 1]")
    last = (datetime.date.today() + datetime.timedelta(days=180)).isoformat()
    assert last in until
    images = np.random.default_rng(0).integers(256, size=(5, 28, 28, 1), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-W", "error", "-c", READER.format(loader=loader), "images.npy", "out.npy"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=tmp_path).stdout
    assert printed == f"{[str(c) for c in range(10)]}\n"
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), imgclf_jax.load(run).predict(images), rtol=0, atol=1e-5)
    described = json.loads(zipfile.ZipFile(file).read("metadata.json"))
    assert (described["images"], described["host_ops"], described["step"]) == (
        {"dtype": "uint8", "shape": ["b", 28, 28, 1]}, "decode(1)|resize(28)", 20)  # fmt: skip
    assert (described["output"]["shape"], described["loads_until"]) == (["b", 10], last)


@pytest.mark.thorough
@pytest.mark.parametrize("gives", ["logits", "features"])
def test_logits_and_features_of_each_seed(run, gives):
    model = imgclf_jax.load(run)
    content = stablehlo.archive(model, gives, datetime.date(2026, 1, 1))[0]
    assert content == stablehlo.archive(model, gives, datetime.date(2026, 1, 1))[0]  # the same model, the same bytes
    archive = zipfile.ZipFile(io.BytesIO(content))
    exported, described = export.deserialize(bytearray(archive.read("model.stablehlo"))), archive.read("metadata.json")
    images = np.random.default_rng(0).integers(256, size=(3, 28, 28, 1), dtype=np.uint8)
    np.testing.assert_allclose(exported.call(images), getattr(model, gives)(images), rtol=1e-5, atol=1e-5)
    assert json.loads(described)["output"]["shape"] == [2, "b", {"logits": 10, "features": 8}[gives]]


@pytest.mark.thorough
def test_a_file_that_differs_from_the_model_is_not_written(run, tmp_path, monkeypatch, capsys):
    lower = stablehlo.lower
    monkeypatch.setattr(stablehlo, "lower", lambda f, *rest: lower(lambda *args: 1.01 * f(*args), *rest))
    assert launch.main(["export", f"{tmp_path}/a.stablehlo", f"--workdir={run}", "--gives=logits"]) == 1
    assert "JAX's outputs differ from the model's by up to" in capsys.readouterr().err
    assert not (tmp_path / "a.stablehlo").exists()


SPECS = {"mlp(widths=(8,))": (8, 1), "cnn(widths=(4, 8), hidden=8)": (28, 1), "rnn": (12, 1), "resnet(18)": (32, 3),
         "resnet_cifar(8)": (16, 3), "wide_resnet(10, 1)": (16, 3), "convnext('T')": (32, 3),
         "vit('Ti', patch=8)": (16, 3), "mixer('S', patch=8)": (16, 3), "airbench": (32, 3)}  # fmt: skip


def made(spec, tta=""):
    """(an untrained model of the spec, images)."""
    size, channels = SPECS[spec]
    config = default_config()
    config.model, config.augment, config.tta = spec, "normalize(0.5, 0.25)", tta
    config.preprocess = f"decode({channels})"
    recipe = Recipe(config, DataInfo(64, (size, size, channels), tuple("abcde"), "-"))
    programs = Programs(recipe)
    images = np.random.default_rng(1).integers(256, size=(8, size, size, channels), dtype=np.uint8)
    first = None
    if hasattr(recipe.model.backbone, "init_on_images"):
        first = np.asarray(jax.jit(lambda x: recipe.augment(train=False)(None, x))(np.tile(images, (8, 1, 1, 1))))
    return Trained(programs, programs.init_state(first), 0), images


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_every_backbone(spec):
    """With TTA views; the CPU program and the file's own form agree, for any number of images."""
    model, images = made(spec, "flip")
    exported = export.deserialize(stablehlo.program(model, "predict").serialize())
    assert exported.platforms == stablehlo.PLATFORMS
    np.testing.assert_allclose(exported.call(images), model.predict(images), rtol=0, atol=1e-5)
    np.testing.assert_allclose(exported.call(images[:3]), model.predict(images[:3]), rtol=0, atol=1e-5)


def test_mistakes(run, tmp_path, capsys):
    for words, message in [
        ([str(tmp_path / "a.pt")], "the suffix must select the format: .stablehlo, .savedmodel, .onnx, .safetensors"),
        ([str(tmp_path / "none" / "a.stablehlo")], "does not exist; create it first"),
        ([], "name the file to write"),
    ]:
        capsys.readouterr()
        assert launch.main(["export", f"--workdir={run}", *words]) == 1
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("jax2onnx", "onnxruntime"))), reason="of the group `onnx`")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of jax2onnx
@pytest.mark.parametrize("spec", SPECS)
def test_every_backbone_as_onnx(spec):
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
