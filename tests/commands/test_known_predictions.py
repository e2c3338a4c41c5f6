"""What `compare --test` finds out and keeps, beside what the runs' own results and `evaluate` say."""

import json

import numpy as np
import pytest

import launch
from imgclf_jax.commands import known_predictions
from imgclf_jax.commands.known_predictions import known
from imgclf_jax.run import records

pytestmark = pytest.mark.thorough
RUN = ("--config.data.source=fake(80, (12, 12, 1), 4)", "--config.preprocess=decode(1)", "--config.augment=normalize",
       "--config.model=mlp(widths=(8,))", "--config.batch_size=16", "--config.total=8 steps",
       "--config.schedule=constant(1e-2)", "--config.eval_every=", "--config.checkpoint_every=4 steps",
       "--config.checkpoint.best=test/loss", "--config.tensorboard=False",
       "--config.data.placement=device")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device):
    """One run of a seed, and one of two at once, of another optimizer."""
    folder = tmp_path_factory.mktemp("runs")
    assert launch.main([f"--workdir={folder / 'a'}", *RUN]) == 0
    assert launch.main([f"--workdir={folder / 'b'}", *RUN, "--config.optimizer=sgd", "--config.num_seeds=2"]) == 0
    return folder


@pytest.fixture(scope="module")
def tested(folder):
    assert launch.main(["compare", str(folder), "--test"]) == 0
    return {run.workdir.path.name: run for run in records.find([str(folder)])[0]}


def test_they_are_those_of_the_result(tested):
    """The share of right ones, exactly, of each seed; the set's examples in their order."""
    one, two = (known(tested[name])["test"] for name in "ab")
    assert one.right.shape == (1, 80)
    assert two.right.shape == (2, 80)
    assert one.pairs_with(two)
    result = tested["a"].result["test"]
    assert one.right.mean() == result["accuracy"]
    assert 0.1 < result["accuracy"] < 1  # so that being equal says something
    assert two.right.mean(1).mean() == pytest.approx(tested["b"].result["test"]["accuracy"])
    assert two.right.mean(1).std(ddof=1) == pytest.approx(tested["b"].result["test"]["accuracy_std"])


def test_they_are_those_of_evaluate(tested, tmp_path, capsys):
    """Its file serves as well."""
    run = tested["a"]
    file = run.workdir.path / "predictions.csv"
    kept = run.workdir.path / known_predictions.FILE
    assert (
        launch.main(["evaluate", f"--workdir={run.workdir.path}", "--checkpoint=latest", f"--predictions={file}"]) == 0
    )
    whole = known(run)["test"]
    kept.rename(tmp_path / "kept")
    listed = known(run)["test"]
    (tmp_path / "kept").rename(kept)
    file.unlink()
    assert listed.pairs_with(whole)
    np.testing.assert_array_equal(listed.right, whole.right)


def test_the_ensembles_file_serves_no_seeds(tested, tmp_path, caplog):
    run = tested["b"]
    kept, file = run.workdir.path / known_predictions.FILE, run.workdir.path / "predictions.jsonl"
    file.write_text('{"set": "test", "example": "0", "label": "0", "correct": true}\n')
    kept.rename(tmp_path / "kept")
    assert known(run) == {}
    assert "holds the ensemble's predictions" in caplog.text
    (tmp_path / "kept").rename(kept)
    file.unlink()


def test_they_are_made_once(tested, folder, monkeypatch, capsys):
    """Unless the run has been extended since, or has other evaluation sets."""
    made = []
    monkeypatch.setattr(known_predictions, "make", lambda run, trust: made.append(run.name) or {})
    assert launch.main(["compare", str(folder), "--test"]) == 0
    assert made == []
    assert "McNemar" in capsys.readouterr().out
    file = tested["a"].workdir.result
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"params_sha256": "another"}))
    assert launch.main(["compare", str(folder), "--test"]) == 0
    file.write_text(before)
    assert made == [tested["a"].name]


def test_a_run_that_names_code_is_left_out(tested, folder, tmp_path, capsys):
    """Unless it is trusted; the others are compared."""
    run = tested["a"]
    kept = run.workdir.path / known_predictions.FILE
    before = run.workdir.config.read_text()
    run.workdir.config.write_text(before.replace("mlp(widths=(8,))", "my_nets:Tiny"))
    kept.rename(tmp_path / "kept")
    assert launch.main(["compare", str(folder), "--test"]) == 0
    err = capsys.readouterr().err
    run.workdir.config.write_text(before)
    (tmp_path / "kept").rename(kept)
    assert "is left out of the tests: the run in" in err
    assert "if you trust both, add --trust" in err
