"""What tools say about a run whose records or checkpoints are not its own."""

import json
import shutil

import pytest
from recorded import append, copy, edit, reproduce, trained  # noqa: F401  fixtures

import launch

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.thorough]


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5]])
def test_what_was_recorded_and_is_no_number(reproduce, copy, value):
    """It differs from any number, and `report` leaves it out."""
    first, rest = (copy / "metrics.jsonl").read_text().split("\n", 1)
    (copy / "metrics.jsonl").write_text(json.dumps(json.loads(first) | {"train/loss": value}) + "\n" + rest)
    status, found = reproduce(copy)
    assert (status, found["verdict"], found["first_step"]) == (1, "different", 5)
    assert launch.main(["report", f"--workdir={copy}"]) == 0


def test_the_checkpoint_of_another_run(copy, tmp_path, capsys):
    """digests.jsonl has the digest of the step."""
    keys = json.loads((copy / "config.json").read_text())
    argv = [f"--workdir={tmp_path}/other", "--config.seed=1", f"--config.data.source={keys['data']['source']}",
            *(f"--config.{key}={keys[key]}" for key in ("preprocess", "model", "batch_size", "total"))]  # fmt: skip
    assert launch.main([*argv, "--config.optimizer=sgd(momentum=0.9)"]) == 0
    shutil.rmtree(copy / "checkpoints" / "10")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "10", copy / "checkpoints" / "10")
    where = f"{copy}/checkpoints/10 holds other parameters than {copy}/digests.jsonl records for step 10"
    own = (*argv[2:], "--config.schedule=cosine(1e-2)", "--config.optimizer=sgd(momentum=0.9)")
    for words in ([f"--workdir={copy}", *own], ["evaluate", f"--workdir={copy}"], ["report", f"--workdir={copy}"],
                  [f"--workdir={tmp_path}/new", *argv[1:], f"--config.init_from={copy}"]):  # fmt: skip
        capsys.readouterr()
        assert launch.main(words) == 1
        assert f"error: checkpoint {where}" in capsys.readouterr().err.splitlines()[-1]
