"""What a sweep says while its runs train, and how it ranks them."""

import json

import pytest

from imgclf_jax import config as configs
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.sweep import status
from imgclf_jax.tools.sweep.status import Progress


def config(**keys):
    new = configs.default_config()
    new.total = "12 steps"
    for key, value in keys.items():
        new[key] = value
    return new


def test_how_far_a_run_is(tmp_path):
    """From its last records, whatever is being written; nothing is known before it has recorded its data."""
    workdir = Workdir(tmp_path)
    assert status.read_progress(config(), workdir) == Progress()
    data = {"train_examples": 64, "image_shape": [2, 2, 1], "class_names": ["a"], "fingerprint": "x"}
    workdir.provenance.write_text(json.dumps({"data": data}))
    assert status.read_progress(config(), workdir) == Progress(0, 12, {})
    with workdir.metrics.open("w") as file:
        for step in range(5000):
            file.write(json.dumps({"step": step // 500, "train/loss": 1.0, "x": "y" * 20}) + "\n")
        file.write(json.dumps({"step": 9, "test/accuracy": 0.5}) + "\n" + '{"step": 10, "test/acc')
    found = status.read_progress(config(), workdir)
    assert (found.step, found.total, found.metrics["test/accuracy"], found.part) == (9, 12, 0.5, 0.75)


@pytest.mark.parametrize(("parts", "before", "seconds", "left"), [
    (1.5, 0.0, 30.0, 50.0),  # 2.5 runs are left, at 20 s each
    (2.0, 1.0, 30.0, 60.0),  # what was done before took none of this time
    (1.0, 1.0, 30.0, None), (0.0, 0.0, 9.0, None), (4.0, 0.0, 9.0, 0.0),
])  # fmt: skip
def test_the_time_that_is_left(parts, before, seconds, left):
    assert status.time_left(parts, before, 4, seconds) == left


def test_what_is_said_of_runs_that_train():
    runs = [("seed=0", config(), Progress(113, 1674, {"test/accuracy": 0.96944})), ("seed=1", config(), Progress())]
    assert status.describe(runs, 2, 6, 185.0) == (
        "2 of 6 runs done, 3 min left; step 113 of 1,674, test/accuracy 0.9694 (seed=0); starting (seed=1)"
    )
    assert status.describe([], 0, 6, None) == "0 of 6 runs done"


def test_the_ranking():
    """By the metric that chooses checkpoints, in its direction, or the task's; what has none is left out."""
    runs = [("a", config(), {"test/accuracy": 0.5, "test/loss": 1.0}), ("b", config(), {}),
            ("long", config(), {"test/accuracy": 0.75, "test/accuracy_std": 0.01, "test/loss": 2.0}),
            ("c", config(), {"test/accuracy": float("nan")})]  # fmt: skip
    assert status.ranking(runs) == [
        "ranking by test/accuracy:", "   1  long  0.7500 ± 0.0100", "   2  a     0.5000"]  # fmt: skip
    by_loss = config()
    by_loss.checkpoint.best = "test/loss"
    assert status.ranking([(name, by_loss, metrics) for name, _, metrics in runs]) == [
        "ranking by test/loss:", "   1  a     1.0000", "   2  long  2.0000"]  # fmt: skip
    assert status.ranking(runs[:2]) == []
    assert status.ranking([(f"{i}", config(), {"test/accuracy": i / 20}) for i in range(12)])[-1] == "      and 2 more"


def test_rows_on_a_narrow_terminal():
    """Names of 48 characters made rows of 93, which a terminal of 80 columns breaks anywhere."""
    name = "optimizer=adam-b2-0.95,schedule=cosine-1e-3"
    details = f"{'done before':<11}  {'98.4 s':>9}  test/accuracy 0.7917"
    assert status.row(name, 48, details, None) == [f"{name:<48}  {details}"]
    assert status.row(name, 48, details, 100) == [f"{name:<48}  {details}"]
    assert status.row(name, 48, details, 80) == [name, f"    {details}"]
    runs = [(f"{name},seed={i}" + "0" * (8 - i), config(), {"test/accuracy": i / 4}) for i in range(2)]
    assert status.ranking(runs, columns=80)[1:3] == [f"   1  {runs[1][0]}", "      0.2500"]
    assert status.ranking(runs, columns=100)[1:3] == [f"   1  {runs[1][0]}   0.2500", f"   2  {runs[0][0]}  0.0000"]


def test_a_result(tmp_path):
    workdir = Workdir(tmp_path)
    assert status.result(workdir) == {}
    workdir.result.write_text(json.dumps({"step": 12, "test": {"accuracy": 0.5, "who": "x"}, "seconds": 1.5}))
    assert status.result(workdir) == {"test/accuracy": 0.5}
