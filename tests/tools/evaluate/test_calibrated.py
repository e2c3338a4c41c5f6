"""Calibration and prediction sets by their definitions, and what the commands make of a calibrated run."""

import json
import zipfile

import jax
import numpy as np
import pytest
from jax import export
from PIL import Image
from scipy import optimize
from scipy.special import log_softmax, softmax

import imgclf_jax
import launch
from imgclf_jax import losses
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.tools.evaluate import calibrated

pytestmark = pytest.mark.usefixtures("one_device")


def drawn(n, classes=5, seed=0):
    """Logits, and labels drawn with their probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 2
    cumulative = np.cumsum(softmax(logits, 1), 1)
    return logits, (rng.random((n, 1)) > cumulative).sum(1).clip(max=classes - 1).astype(np.int32)


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_temperature_maximizes_the_likelihood_of_the_mean_probabilities(seeds):
    """Logits that are three times too large have a temperature of about 3."""
    logits, labels = drawn(2000)
    noise = np.random.default_rng(1).normal(size=(seeds, *logits.shape)) * (seeds - 1)
    given = np.float32(3 * logits + noise)

    def nll(scale):
        return -np.log(softmax(np.float64(given) * scale, -1).mean(0)[np.arange(len(labels)), labels]).mean()

    wanted = optimize.minimize_scalar(nll, bounds=(0.05, 5), method="bounded", options={"xatol": 1e-9}).x
    scale, bias = calibrated.fit(given, labels, losses.SOFTMAX, "temperature")
    assert scale == pytest.approx([wanted], rel=1e-5)
    assert 1 / wanted == pytest.approx(3, rel=0.1)
    assert bias == [0]


def test_vector_scaling_is_where_the_gradient_vanishes():
    logits, labels = drawn(2000)
    given = np.float32(logits * [1, 2, 3, 2, 1] + [0, 1, 0, -1, 0])
    scale, bias = calibrated.fit(given[None], labels, losses.SOFTMAX, "vector")
    error = softmax(given * scale + bias, 1) - np.eye(5)[labels]
    np.testing.assert_allclose([error.mean(0), (error * given).mean(0)], 0, atol=1e-6)
    # Without mistakes the likelihood grows with the scale for ever, at whatever number an optimizer stops.
    for method in ("temperature", "vector"):
        with pytest.raises(UserError, match="the 2000 examples of val hold too few mistakes"):
            calibrated.fit(8 * np.eye(5, dtype=np.float32)[None, labels], labels, losses.SOFTMAX, method)


def test_sets_are_those_of_the_definition_and_cover_what_is_wanted():
    """The most probable classes until their sum reaches the quantile; of exchangeable examples at least 0.8."""
    logits, labels = drawn(40_000)
    probabilities = np.float32(softmax(logits / 2, 1))  # the guarantee holds for a model that is not calibrated
    before, rows = calibrated.sums_before(probabilities), np.arange(40_000)
    sums, own = before[rows, labels], probabilities[rows, labels]
    covered = []
    for start in range(0, 40_000, 200):
        val, test = slice(start, start + 59), slice(start + 59, start + 200)
        scores = calibrated.scores(sums[val], own[val])
        limit = calibrated.threshold(scores, 0.8)
        assert (scores <= limit).sum() == 48  # ceil(60 * 0.8) of 59
        covered.append((sums[test] < limit).mean())
        row = probabilities[test][0]
        order = np.argsort(-row)
        count = 1 + int((np.cumsum(np.float64(row[order])) < limit).sum())
        assert set(np.flatnonzero(before[test][0] < limit)) == {*order[:count].tolist()}
    assert 0.8 < np.mean(covered) < 0.95
    assert calibrated.threshold(scores, 0.99) == np.inf  # which 59 examples cannot tell


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A calibrated run, whose `val` is a part of the training examples that it has not seen."""
    workdir = tmp_path_factory.mktemp("digits") / "run"
    keys = ["--config.data.train=train[:60%]", "--config.data.eval.val=train[60%:]", "--config.model=mlp(widths=(16,))",
            "--config.preprocess=decode(1)", "--config.total=60 steps", "--config.schedule=constant(1e-2)",
            "--config.eval_every=", "--config.tensorboard=False"]  # fmt: skip
    assert launch.main([f"--workdir={workdir}", *keys]) == 0
    return workdir


@pytest.fixture
def written(run, printed):
    """What `evaluate --calibrate` prints, after it has written its file."""
    return json.loads(printed("evaluate", f"--workdir={run}", "--calibrate=temperature", "--format=json"))


LABELS = sources.digits()["train"].labels[862:]  # of `val`


@pytest.fixture(scope="module")
def pixels():
    return sources.digits()["train"].read(np.arange(862, 1437))["image"]


def test_every_command_uses_it(run, written, pixels, tmp_path, capsys):
    """Those of the logits divided by the temperature, in the exported file too; `--temperature=1` undoes it."""
    val = written["val"]
    model = imgclf_jax.load(run)
    logits = model.logits(pixels)
    expected = softmax(logits * written["scale"], 1)
    np.testing.assert_allclose(model.predict(pixels), expected, rtol=1e-5, atol=1e-7)
    for name, x in (("nll", logits), ("calibrated_nll", logits * written["scale"])):
        assert val[name] == pytest.approx(-log_softmax(x, 1)[np.arange(575), LABELS].mean(), rel=1e-5)
    assert val["calibrated_nll"] < val["nll"]
    file = tmp_path / "a.stablehlo"
    for flags, wanted in (([], expected), (["--temperature=1"], softmax(logits, 1))):
        assert launch.main(["export", str(file), f"--workdir={run}", *flags]) == 0
        exported = export.deserialize(bytearray(zipfile.ZipFile(file).read("model.stablehlo")))
        np.testing.assert_allclose(jax.jit(exported.call)(pixels), wanted, rtol=1e-4, atol=1e-6)


def test_rejection_and_sets_are_measured_on_val(run, written, pixels, tmp_path, printed):
    """As many images of `val` are undecided as wanted, and the sets hold as many labels as `evaluate` says."""
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i:03d}.png")
    command = ["predict", str(tmp_path), f"--workdir={run}", "--reject=0.1", "--coverage=0.9"]
    records = json.loads(printed(*command, "--format=json"))
    assert sum(record["decision"] is None for record in records) == 57  # of 575
    held = [str(label) in record["set"] for label, record in zip(LABELS, records, strict=True)]
    assert np.mean(held) == written["val"]["coverage_0.9"] >= 0.9
    assert np.mean([len(record["set"]) for record in records]) == pytest.approx(written["val"]["classes_0.9"])
    header, first, *_ = printed(*command, "--format=csv", "--top_k=1").splitlines()
    assert header == "file,error,class_1,probability_1,decision,set"
    assert first.endswith(f",{records[0]['decision'] or 'undecided'},{'|'.join(records[0]['set'])}")


@pytest.mark.parametrize(("change", "said"), [
    ({"of": {"version": 1, "variables_sha256": "0"}}, "is of another variables_sha256 and tta"),
    ({"numbers": {"scale": [1.0, 2.0], "bias": [0.0]}}, "is damaged: remove it"),
    ({"numbers": None}, "is damaged: remove it"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_or_left_out_with_a_sentence(run, written, tmp_path, capsys, change, said):
    """Of other parameters, as after more training, it calibrates nothing."""
    file = run / "calibration.json"
    own = json.loads(file.read_text())
    file.write_text(json.dumps(own | change))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    status = launch.main(["predict", str(tmp_path), f"--workdir={run}"])
    assert said in capsys.readouterr().err
    assert status == ("damaged" in said)
    assert launch.main(["predict", str(tmp_path), f"--workdir={run}", "--coverage=0.9"]) == 1


@pytest.mark.parametrize(("flags", "message"), [
    (["--coverage=0.9", "--temperature=1"], "--coverage needs the run's own calibration"),
    (["--config.tta=flip"], "is of another tta"),
])  # fmt: skip
def test_what_a_calibration_does_not_fit(run, written, tmp_path, capsys, flags, message):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert launch.main(["predict", str(tmp_path), *flags, f"--workdir={run}"]) == ("tta" not in message)
    assert message in capsys.readouterr().err
