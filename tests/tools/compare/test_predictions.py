"""The predictions that `compare --test` makes and saves, against the runs' results and `evaluate`."""

import csv
import json

import numpy as np
import pytest
from cases import flags
from recorded import copy, edit, trained  # noqa: F401  fixtures

import launch
from imgclf_jax.run import record
from imgclf_jax.tools.compare import predictions
from imgclf_jax.tools.compare.predictions import load

RUN = flags("data.source=fake(80, (12, 12, 1), 4)", "augment=normalize", "model=mlp(widths=(8,))", "total=8 steps",
            "schedule=constant(1e-2)", "eval_every=", "checkpoint.best=test/loss", "tensorboard=False")  # fmt: skip


@pytest.mark.thorough
def test_they_are_those_of_the_result_and_of_evaluate(tmp_path, one_device, capsys):
    """The exact accuracy of each seed, in the order of the rows of `evaluate`; a run that names code is left out."""
    for name, more in (("a", []), ("b", ["--config.optimizer=sgd", "--config.num_seeds=2"])):
        assert launch.main([f"--workdir={tmp_path / name}", *RUN, *more]) == 0
    config = tmp_path / "a" / "config.json"
    before = config.read_text()
    config.write_text(before.replace("mlp(widths=(8,))", "os:system('false')"))
    assert launch.main(["compare", str(tmp_path), "--test"]) == 0
    assert "if you trust both, add --trust" in capsys.readouterr().err
    assert not (tmp_path / "a" / predictions.FILE).exists()
    config.write_text(before)
    assert launch.main(["compare", str(tmp_path), "--test"]) == 0
    assert "McNemar" in capsys.readouterr().out
    runs = [record.read(tmp_path / name) for name in "ab"]
    one, two = (load(run)["test"] for run in runs)
    assert (one.shape, two.shape) == ((1, 80), (2, 80))
    assert 0.1 < one.mean() == runs[0].result["test"]["accuracy"] < 1
    assert two.mean(1).mean() == pytest.approx(runs[1].result["test"]["accuracy"])
    assert two.mean(1).std(ddof=1) == pytest.approx(runs[1].result["test"]["accuracy_std"])
    file = tmp_path / "rows.csv"
    evaluate = ["evaluate", f"--workdir={tmp_path / 'a'}", "--checkpoint=latest", f"--predictions={file}"]
    assert launch.main(evaluate) == 0
    listed = [row["correct"] == "True" for row in csv.DictReader(file.read_text().splitlines())]
    np.testing.assert_array_equal(one[0], listed)


@pytest.mark.thorough
def test_predictions_are_of_the_result_or_not_used(trained, copy, one_device, capsys):
    data, file = trained.parent / "data.npz", copy / predictions.FILE
    before, arrays = data.read_bytes(), dict(np.load(data))
    np.savez(data, **arrays | {"y_test": (arrays["y_test"] + 1) % 3})
    assert launch.main(["compare", str(copy), "--test"]) == 0
    assert ": the evaluation set test has changed since training" in capsys.readouterr().err
    assert not file.exists()
    data.write_bytes(before)
    assert launch.main(["compare", str(copy), "--test"]) == 0
    result = json.loads((copy / "result.json").read_text())
    assert load(record.read(copy))["test"].mean() == result["test"]["accuracy"]
    edit(copy / "result.json", lambda result: result.update(params_sha256="another"))
    assert load(record.read(copy)) == {}
