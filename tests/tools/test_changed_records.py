"""What tools say about a run whose records or checkpoints are not its own."""

import json
import shutil
from pathlib import Path

import pytest
from recorded import append, copy, edit, reproduce, trained  # noqa: F401  fixtures

import launch

pytestmark = pytest.mark.usefixtures("one_device")


def edit_first(file: Path, changed: dict) -> None:
    """Changes the first record of a file."""
    first, rest = file.read_text().split("\n", 1)
    file.write_text(json.dumps(json.loads(first) | changed) + "\n" + rest)


@pytest.mark.thorough
@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 10**25, 10**400])
def test_what_was_recorded_and_is_no_number(reproduce, copy, value):
    """It was not compared, and the verdict was "same"; the last one ended in a traceback, in `report` too."""
    edit_first(copy / "metrics.jsonl", {"train/loss": value})
    status, found = reproduce(copy)
    assert (status, found["verdict"], found["first_step"]) == (1, "different", 5)
    assert launch.main(["report", f"--workdir={copy}"]) == 0


@pytest.mark.thorough
def test_the_checkpoint_of_another_run(copy, tmp_path, capsys):
    """Its accuracy was printed with status 0, although digests.jsonl has the step."""
    keys = json.loads((copy / "config.json").read_text())
    argv = [f"--workdir={tmp_path}/other", "--config.seed=1", f"--config.data.source={keys['data']['source']}",
            *(f"--config.{key}={keys[key]}" for key in ("preprocess", "model", "batch_size", "total"))]  # fmt: skip
    assert launch.main([*argv, "--config.optimizer=sgd(momentum=0.9)"]) == 0
    shutil.rmtree(copy / "checkpoints" / "10")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "10", copy / "checkpoints" / "10")
    capsys.readouterr()
    for words in (["evaluate"], ["evaluate", "--checkpoints=all"], ["evaluate", "--checkpoint=10"], ["report"]):
        assert launch.main([*words, f"--workdir={copy}"]) == 1
        where = f"{copy}/checkpoints/10 holds other parameters than {copy}/digests.jsonl records for step 10"
        sentence = f"error: checkpoint {where}"
        assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert launch.main([f"--workdir={tmp_path}/new", *argv[1:], f"--config.init_from={copy}"]) == 1
    assert "holds other parameters" in capsys.readouterr().err
