"""`evaluate --checkpoints` reproduces the metrics of each checkpoint from when it was saved."""

import json

import pytest

import launch
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("fake") / "run"
    flags = ["total=12 steps", "batch_size=16", "data.source=fake(64, (12, 12, 1), 4)", "preprocess=decode(1)",
             "model=mlp(widths=(8,))", "schedule=constant(1e-2)", "eval_every=4 steps", "checkpoint_every=4 steps",
             "checkpoint.keep=3"]  # fmt: skip
    assert launch.main([f"--workdir={workdir}", *(f"--config.{flag}" for flag in flags)]) == 0
    return workdir


def evaluated(capsys, *words):
    capsys.readouterr()
    return launch.main(["evaluate", *words]), capsys.readouterr()


@pytest.mark.thorough
def test_each_has_the_metrics_of_its_time(run, capsys):
    status, (out, _) = evaluated(capsys, f"--workdir={run}", "--checkpoints=all", "--format=json")
    assert status == 0
    found = {record["step"]: record["test"] for record in json.loads(out)}
    logged = {r["step"]: r for r in read_metrics(Workdir(run).metrics) if "test/accuracy" in r}
    assert list(found) == [4, 8, 12]
    for step, metrics in found.items():
        assert {f"test/{name}": value for name, value in metrics.items()}.items() <= logged[step].items()
    assert len({metrics["loss"] for metrics in found.values()}) == 3


@pytest.mark.thorough
def test_some_of_them_as_a_table(run, capsys):
    _, (out, _) = evaluated(capsys, f"--workdir={run}", "--checkpoints=12,4")
    rows = [[cell.strip() for cell in line.strip("│┃").split("│" if "│" in line else "┃")]
            for line in out.splitlines() if "│" in line or "┃" in line]  # fmt: skip
    assert rows[0] == ["step", "test/accuracy", "test/loss", "test/nll"]
    assert [row[0] for row in rows[1:]] == ["12", "4"]


@pytest.mark.thorough
@pytest.mark.parametrize(("words", "message"), [
    (["--checkpoints=4,5"], "--checkpoints=4,5: there are [4, 8, 12]"),
    (["--checkpoints=all", "--checkpoint=4"], "drop --checkpoint"),
])  # fmt: skip
def test_mistakes(run, capsys, words, message):
    status, (_, err) = evaluated(capsys, f"--workdir={run}", *words)
    assert status == 1
    assert message in err
