"""Several labels per example: several seeds, probes, files for other programs, sweeps and comparisons."""

import json

import numpy as np
import pytest
import tensorflow as tf
from cases import thorough
from test_tasks import FLAGS, LOSS, expected, outputs_of, printed, refused, runs, train  # noqa: F401

import launch
from imgclf_jax import datasets, losses
from imgclf_jax.tools.probe import command as probe
from imgclf_jax.trained import restore


@pytest.mark.parametrize("name", thorough("pairs", "soft"))
def test_several_seeds_report_means_and_their_ensemble(tmp_path, name):
    """An ensemble averages the probabilities, also with mixing and accumulation."""
    workdir = train(tmp_path, name, "--config.num_seeds=2", "--config.mix=mixup(0.2)", "--config.accumulate=2")
    targets, together = outputs_of(workdir)
    model = restore(workdir.load_config(), workdir, "latest")
    images = model.programs.eval_images(datasets.open_data(workdir.load_config())["test"])
    everything = np.arange(len(images))
    read = images.read(everything, everything)
    logits = np.asarray(model.programs.inference("logits")(*model.state.evaluated, read["image"]))
    each = np.asarray(losses.link_of(LOSS[name]).probabilities(logits), np.float64)
    np.testing.assert_allclose(each.mean(0), together, rtol=1e-5, atol=1e-6)
    result = json.loads(workdir.result.read_text())["test"]
    seeds = [expected(name, targets, own) for own in each]
    for key, value in expected(name, targets, together).items():
        assert result[f"ensemble_{key}"] == pytest.approx(value, rel=1e-4)
        assert result[key] == pytest.approx(np.mean([one[key] for one in seeds]), rel=1e-4)
        assert result[f"{key}_std"] == pytest.approx(np.std([one[key] for one in seeds], ddof=1), rel=1e-2, abs=1e-6)


@pytest.mark.thorough
def test_probe_of_several_labels(runs, capsys, monkeypatch):
    """The scores of a logistic regression on the same features, by scikit-learn."""
    monkeypatch.setattr(probe.probing, "STRENGTHS", (1.0,))
    for name, score in (("pairs", "mean_average_precision"),):
        argv = ["probe", f"--workdir={runs(name).path}", "--checkpoint=latest"]
        results = {one["method"]: one for one in json.loads(printed(capsys, *argv, "--format=json"))["results"]}
        assert {one["score"] for one in results.values()} == {score}
        assert not any("accuracies" in one for one in results.values())
        assert results["logistic regression"]["mean"] > 0.5
        assert score in printed(capsys, *argv)


@pytest.mark.parametrize(("name", "gives"), thorough(("pairs", "probabilities")))
def test_files_for_other_programs(runs, capsys, tmp_path, name, gives):
    """TensorFlow returns the model's outputs; a run that starts from the PyTorch weights predicts the same."""
    workdir = runs(name).path
    argv = ["export", f"--workdir={workdir}", "--checkpoint=latest"]
    assert f"{gives} of uint8 images" in printed(capsys, *argv, tmp_path / "a.savedmodel")
    model = restore(runs(name).load_config(), runs(name), "latest")
    images = np.random.default_rng(0).integers(256, size=(3, *model.programs.recipe.data.image_shape), dtype=np.uint8)
    function = tf.saved_model.load(str(tmp_path / "a.savedmodel")).signatures["serving_default"]
    np.testing.assert_allclose(function(images=images)[gives], model.predict(images), rtol=1e-4, atol=1e-6)
    printed(capsys, *argv, tmp_path / "a.safetensors")
    config = runs(name).load_config()
    flags = [f"--config.{key}={config[key]}" for key in ("loss", "model", "preprocess", "augment")]
    flags += [f"--config.data.source={config.data.source}", f"--config.init_from={tmp_path / 'a.safetensors'}"]
    found = json.loads(printed(capsys, "evaluate", *flags, "--format=json"))["test"]
    wanted = json.loads(runs(name).result.read_text())["test"]
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", thorough("pairs"))
def test_compare_and_reproduce(tmp_path, capsys, name):
    for seed in (0, 1):
        train(tmp_path, name, f"--config.seed={seed}")
        (tmp_path / name).rename(tmp_path / f"run{seed}")
    train(tmp_path, name, "--config.model=mlp(widths=(8,))")
    (tmp_path / name).rename(tmp_path / "run2")
    dirs = [tmp_path / f"run{i}" for i in range(3)]
    found = json.loads(printed(capsys, "compare", *dirs, "--test", "--format=json"))
    shown = printed(capsys, "compare", *dirs, f"--html={tmp_path / 'a.html'}")
    [one] = found["comparisons"]
    exact = [json.loads((path / "result.json").read_text())["test"]["exact_match"] for path in dirs]
    assert abs(one["difference"]["value"]) == pytest.approx(abs(exact[2] - np.mean(exact[:2])), abs=1e-6)
    assert one["difference"]["low"] < one["difference"]["value"] < one["difference"]["high"]
    assert "with all labels, if there are several" in " ".join(shown.split())
    assert "test/mean_average_precision" in (tmp_path / "a.html").read_text()
    assert "accuracy" not in shown
    capsys.readouterr()
    assert launch.main(["reproduce", str(tmp_path / "run0")]) == 0
