"""The predictions that `compare --test` makes and saves, against the runs' results and `evaluate`."""

import json

import numpy as np
import pytest

import launch
from imgclf_jax.run import record
from imgclf_jax.tools.compare import saved_predictions
from imgclf_jax.tools.compare.saved_predictions import load

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
    """The exact accuracy of each seed; the set's examples in order."""
    one, two = (load(tested[name])["test"] for name in "ab")
    assert one.correct.shape == (1, 80)
    assert two.correct.shape == (2, 80)
    assert one.pairs_with(two)
    result = tested["a"].result["test"]
    assert one.correct.mean() == result["accuracy"]
    assert 0.1 < result["accuracy"] < 1  # so that being equal says something
    assert two.correct.mean(1).mean() == pytest.approx(tested["b"].result["test"]["accuracy"])
    assert two.correct.mean(1).std(ddof=1) == pytest.approx(tested["b"].result["test"]["accuracy_std"])


@pytest.mark.thorough
def test_they_are_those_of_evaluate(tested, tmp_path, capsys):
    """Its file works as well."""
    run = tested["a"]
    file = run.workdir.path / "predictions.csv"
    kept = run.workdir.path / saved_predictions.FILE
    assert (
        launch.main(["evaluate", f"--workdir={run.workdir.path}", "--checkpoint=latest", f"--predictions={file}"]) == 0
    )
    whole = load(run)["test"]
    kept.rename(tmp_path / "kept")
    listed = load(run)["test"]
    (tmp_path / "kept").rename(kept)
    file.unlink()
    assert listed.pairs_with(whole)
    np.testing.assert_array_equal(listed.correct, whole.correct)


@pytest.mark.thorough
def test_the_ensembles_file_serves_no_seeds(tested, tmp_path, caplog):
    run = tested["b"]
    kept, file = run.workdir.path / saved_predictions.FILE, run.workdir.path / "predictions.jsonl"
    file.write_text('{"set": "test", "example": "0", "label": "0", "correct": true}\n')
    kept.rename(tmp_path / "kept")
    assert load(run) == {}
    assert "has the ensemble's predictions" in caplog.text
    (tmp_path / "kept").rename(kept)
    file.unlink()


@pytest.mark.thorough
def test_they_are_made_once(tested, folder, tmp_path, monkeypatch, capsys):
    """Unless the run has been extended since, or has other evaluation sets."""
    made = []
    monkeypatch.setattr(saved_predictions, "make", lambda run, trust: made.append(run.name) or {})
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


@pytest.mark.thorough
def test_a_run_that_names_code_is_left_out(tested, folder, tmp_path, capsys):
    """Unless it is trusted; the others are compared."""
    run = tested["a"]
    kept = run.workdir.path / saved_predictions.FILE
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


def only(folder):
    return load(record.read(folder))


@pytest.mark.thorough
def test_predictions_of_another_checkpoint_config_or_data_are_not_used(arrays_run, capsys):
    """Those of an earlier step, with other views, or of other labels, made a better run the worse one (p = 0.0001)."""
    folder, argv = arrays_run
    file, data = folder / "predictions.csv", folder.parent / "data.npz"
    evaluate = ["evaluate", f"--workdir={folder}", f"--predictions={file}"]
    assert launch.main([*evaluate, "--checkpoint=8"]) == 0
    correct = only(folder)["test"].correct
    assert correct.mean() == json.loads((folder / "result.json").read_text())["test"]["accuracy"]
    for words in (["--checkpoint=4"], ["--checkpoint=8", "--config.tta=translate(2)"]):
        assert launch.main([*evaluate, *words]) == 0
        assert only(folder) == {}
        assert (
            "predictions.csv, which has another checkpoint, config or data than the run's result"
            in capsys.readouterr().err
        )

    before = data.read_bytes()
    arrays = dict(np.load(data))
    np.savez(data, **arrays | {"y_test": (arrays["y_test"] + 1) % 3})
    assert launch.main([*evaluate, "--checkpoint=8"]) == 0
    assert "the evaluation set test has changed since training" in capsys.readouterr().err
    assert only(folder) == {}
    assert launch.main(["compare", str(folder), "--test"]) == 0
    assert ": its evaluation set test has changed since training" in capsys.readouterr().err
    assert not (folder / saved_predictions.FILE).exists()
    assert launch.main(argv) == 1
    assert "holds a run on other data or weights: evals.test was" in capsys.readouterr().err
    data.write_bytes(before)
    assert launch.main(["compare", str(folder), "--test"]) == 0
    np.testing.assert_array_equal(only(folder)["test"].correct, correct)
