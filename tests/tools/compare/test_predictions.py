"""The predictions that `compare --test` makes and saves, against the runs' results and `evaluate`."""

import csv
import json

import numpy as np
import pytest

import launch
from imgclf_jax.run import record
from imgclf_jax.tools.compare import predictions
from imgclf_jax.tools.compare.predictions import load

RUN = ("--config.data.source=fake(80, (12, 12, 1), 4)", "--config.preprocess=decode(1)", "--config.augment=normalize",
       "--config.model=mlp(widths=(8,))", "--config.batch_size=16", "--config.total=8 steps",
       "--config.schedule=constant(1e-2)", "--config.eval_every=", "--config.checkpoint_every=4 steps",
       "--config.checkpoint.best=test/loss", "--config.tensorboard=False",
       "--config.data.placement=device")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device):
    """A run of one seed, and a run of two seeds with another optimizer."""
    folder = tmp_path_factory.mktemp("runs")
    assert launch.main([f"--workdir={folder / 'a'}", *RUN]) == 0
    assert launch.main([f"--workdir={folder / 'b'}", *RUN, "--config.optimizer=sgd", "--config.num_seeds=2"]) == 0
    return folder


@pytest.fixture(scope="module")
def tested(folder):
    assert launch.main(["compare", str(folder), "--test"]) == 0
    return {run.workdir.path.name: run for run in record.find([str(folder)])[0]}


@pytest.mark.thorough
def test_they_are_those_of_the_result(tested):
    """The exact accuracy of each seed."""
    one, two = (load(tested[name])["test"] for name in "ab")
    assert (one.shape, two.shape) == ((1, 80), (2, 80))
    result = tested["a"].result["test"]
    assert one.mean() == result["accuracy"]
    assert 0.1 < result["accuracy"] < 1  # so that being equal says something
    assert two.mean(1).mean() == pytest.approx(tested["b"].result["test"]["accuracy"])
    assert two.mean(1).std(ddof=1) == pytest.approx(tested["b"].result["test"]["accuracy_std"])


@pytest.mark.thorough
def test_they_are_those_of_evaluate(tested, tmp_path):
    """In the order of its rows."""
    file, run = tmp_path / "rows.csv", tested["a"]
    assert launch.main(["evaluate", f"--workdir={run.path}", "--checkpoint=latest", f"--predictions={file}"]) == 0
    with file.open(newline="") as stream:
        listed = [row["correct"] == "True" for row in csv.DictReader(stream)]
    np.testing.assert_array_equal(load(run)["test"][0], listed)


@pytest.mark.thorough
def test_they_are_made_once(tested, folder, tmp_path, monkeypatch, capsys):
    """Unless the run has been extended since, or has other evaluation sets."""
    made = []
    monkeypatch.setattr(predictions, "make", lambda run, trust: made.append(run.name) or {})
    assert launch.main(["compare", str(folder), "--test"]) == 0
    assert made == []
    assert "McNemar" in capsys.readouterr().out
    file = tested["a"].workdir.result
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"params_sha256": "another"}))
    tested["a"].workdir.digests.rename(tmp_path / "digests")
    assert launch.main(["compare", str(folder), "--test"]) == 0
    file.write_text(before)
    (tmp_path / "digests").rename(tested["a"].workdir.digests)
    assert made == [tested["a"].name]
    assert launch.main(["compare", str(folder), "--test"]) == 0


@pytest.mark.thorough
def test_a_run_that_names_code_is_left_out(tested, folder, tmp_path, capsys):
    """Unless it is trusted; the others are compared."""
    run = tested["a"]
    kept = run.workdir.path / predictions.FILE
    before = run.workdir.config.read_text()
    run.workdir.config.write_text(before.replace("mlp(widths=(8,))", "my_nets:Tiny"))
    kept.rename(tmp_path / "kept")
    assert launch.main(["compare", str(folder), "--test"]) == 0
    err = capsys.readouterr().err
    run.workdir.config.write_text(before)
    (tmp_path / "kept").rename(kept)
    assert "the paired tests skip " in err
    assert "if you trust both, add --trust" in err


@pytest.fixture
def arrays_run(tmp_path, one_device):
    """A run on arrays in a file, with checkpoints of steps 4 and 8, and its training arguments."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(48, 6, 6), dtype=np.uint8), np.arange(48) % 3
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images[:24], y_test=labels[:24])
    argv = [f"--workdir={tmp_path / 'run'}", *RUN[1:], f"--config.data.source=arrays('{tmp_path}/data.npz')"]
    assert launch.main(argv) == 0
    return tmp_path / "run", argv


@pytest.mark.thorough
def test_predictions_are_of_the_result_or_not_used(arrays_run, capsys):
    """Of other labels they made a better run the worse one (p = 0.0001)."""
    folder, argv = arrays_run
    data, file = folder.parent / "data.npz", folder / predictions.FILE
    before = data.read_bytes()
    arrays = dict(np.load(data))
    np.savez(data, **arrays | {"y_test": (arrays["y_test"] + 1) % 3})
    assert launch.main(["compare", str(folder), "--test"]) == 0
    assert ": the evaluation set test has changed since training" in capsys.readouterr().err
    assert not file.exists()
    data.write_bytes(before)
    assert launch.main(["compare", str(folder), "--test"]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert load(record.read(folder))["test"].mean() == result["test"]["accuracy"]
    assert launch.main(["train", *argv, "--config.total=12 steps", "--extend"]) == 0
    assert load(record.read(folder)) == {}
