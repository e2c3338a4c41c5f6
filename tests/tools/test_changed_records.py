"""What each tool says about a run whose records were changed by hand; none may believe them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cases import thorough
from PIL import Image
from recorded import append, copy, edit, reproduce, trained  # noqa: F401  fixtures

import launch
from imgclf_jax.run import workdir

pytestmark = pytest.mark.usefixtures("one_device")


def replace_first(path, pattern, text):
    path.write_text(re.sub(pattern, text, path.read_text(), count=1))


RECORDS = {
    "the result's accuracy": (
        lambda run: edit(run / "result.json", lambda r: r["test"].update(accuracy=0.99)),
        "at step 10, test/accuracy is 0.99 in result.json but 0.3333333333333333 in metrics.jsonl",
    ),
    "the result's digest": (
        lambda run: edit(run / "result.json", lambda r: r.update(params_sha256="0" * 64)),
        "result.json has another parameter digest for step 10 than digests.jsonl",
    ),
    "the result's step": (
        lambda run: edit(run / "result.json", lambda r: r.update(step=9)),
        "result.json is from step 9, which digests.jsonl does not have",
    ),
    "another value of a metric": (
        lambda run: append(run / "metrics.jsonl", '{"step": 10, "test/accuracy": 0.99}\n'),
        "metrics.jsonl has two values of test/accuracy at step 10",
    ),
    "an earlier value of a metric": (
        lambda run: replace_first(run / "metrics.jsonl", r'"train/loss": [^,}]*', '"train/loss": 0.125'),
        "metrics.jsonl has other records from step 4 to 8 than digests.jsonl knows",
    ),
}


@pytest.mark.parametrize("changed", [*list(RECORDS)[:1], *thorough(*list(RECORDS)[1:])])
def test_a_record_that_contradicts_itself(reproduce, copy, tmp_path, capsys, changed):
    """`reproduce` said "The same, bit for bit" for each; `compare` showed the accuracy."""
    change, sentence = RECORDS[changed]
    change(copy)
    status, found = reproduce(copy, "--steps=1")
    assert (status, found["verdict"]) == (1, "contradictory")
    assert sentence in found["contradictions"][0]
    assert launch.main(["compare", str(copy.parent)]) == 1
    assert f"{copy} contradicts itself: {sentence}" in capsys.readouterr().err
    assert launch.main(["report", f"--workdir={copy}"]) == 0
    assert sentence in (copy / "report.html").read_text()
    assert launch.main(["evaluate", f"--workdir={copy}"]) == 0
    assert f"the record of the run contradicts itself: {sentence}" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_config_that_was_changed_by_hand(reproduce, copy, tmp_path, capsys):
    """Predictions used another preprocessing, silently and with status 0. Another JSON layout is not a change."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config, sort_keys=True))
    assert reproduce(copy, "--steps=1")[0] == 0
    (copy / "config.json").write_text(json.dumps({**config, "tta": "flip"}))
    Image.fromarray(np.zeros((6, 6), np.uint8)).save(tmp_path / "a.png")
    for words in (["evaluate"], ["predict", str(tmp_path / "a.png")]):
        workdir._warn_once.cache_clear()
        capsys.readouterr()
        launch.main([*words, f"--workdir={copy}"])
        assert "config.json has been changed since the run wrote it" in capsys.readouterr().err
    assert launch.main(["compare", str(copy.parent)]) == 1
    assert "config.json has been changed" in capsys.readouterr().err
    status, found = reproduce(copy, "--steps=1")
    assert (status, found["verdict"]) == (1, "contradictory")


@pytest.mark.parametrize(
    "change",
    [lambda p: p["data"]["class_names"].reverse(), *thorough(lambda p: p["evals"].update(test=""))],
)
def test_a_provenance_that_was_changed_by_hand(reproduce, copy, tmp_path, capsys, change):
    """With two class names swapped, `predict` confused the two classes, silently and with status 0."""
    edit(copy / "provenance.json", change)
    Image.fromarray(np.zeros((6, 6), np.uint8)).save(tmp_path / "a.png")
    workdir._warn_once.cache_clear()
    capsys.readouterr()
    launch.main(["predict", str(tmp_path / "a.png"), f"--workdir={copy}"])
    assert "provenance.json has been changed since the run wrote it" in capsys.readouterr().err
    assert launch.main(["compare", str(copy.parent)]) == 1
    assert "provenance.json has been changed" in capsys.readouterr().err
    status, found = reproduce(copy, "--steps=1")
    assert (status, found["verdict"]) == (1, "contradictory")


@pytest.mark.thorough
def test_a_duration_that_was_changed_by_hand(reproduce, copy, capsys):
    """Nothing else records how long a run took: the page showed the edited number, silently and with status 0."""
    edit(copy / "result.json", lambda result: result.update(epochs=99.0))
    for words in (["report", f"--workdir={copy}"], ["evaluate", f"--workdir={copy}"]):
        capsys.readouterr()
        assert launch.main(words) == 0
        assert "result.json has been changed since the run wrote it" in capsys.readouterr().err
    assert "result.json has been changed since the run wrote it" in (copy / "report.html").read_text()
    assert launch.main(["compare", str(copy.parent)]) == 1
    status, found = reproduce(copy, "--steps=1")
    assert (status, found["verdict"]) == (1, "contradictory")


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
    assert (status, found["verdict"], found["first_step"]) == (1, "contradictory", 5)
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
    (copy / "digests.jsonl").unlink()
    assert launch.main(["evaluate", f"--workdir={copy}"]) == 1
    assert f"than {copy}/result.json records for step 10" in capsys.readouterr().err
