"""What reading a run may do: a work directory that someone else made runs none of their code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import thorough
from test_mistakes import FAKE, _process_as_it_was, has, mistake  # noqa: F401  fixtures

import launch

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert launch.main([f"--workdir={workdir}", *FAKE]) == 0
    return workdir


@pytest.mark.parametrize("key", ["model", "preprocess", "preprocess_eval", "augment", "mix", "loss", "optimizer",
                                 "schedule", "metrics", "tta", "data.source", "data.eval.test"])  # fmt: skip
@pytest.mark.parametrize("command", ["evaluate", *thorough("predict")])
def test_a_run_that_names_code(mistake, trained, tmp_path, command, key):
    """Whatever the key: nothing is imported. What would be is named."""
    shutil.copytree(trained, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    call = f"os:system('touch {tmp_path}/harm')"
    *parents, leaf = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[leaf] = {"data.eval.test": f"{call}/test"}.get(key, f"decode(1)|{call}" if "preprocess" in key else call)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "a.png").write_bytes(b"")
    files = [tmp_path / "a.png"] if command == "predict" else []
    if command == "predict" and key in ("mix", "metrics", "data.source", "data.eval.test"):  # it has no use for them
        launch.main([command, *map(str, files), f"--workdir={tmp_path}/run"])
    else:
        sentence = mistake(command, *files, f"--workdir={tmp_path}/run", log=r"^\d\d:\d\d:\d\d")
        assert has(sentence, f"the run in {tmp_path}/run names", "'os:system'", "import the module 'os'", "add --trust")
    assert not (tmp_path / "harm").exists()


def test_a_run_that_names_a_program_of_tfds(mistake, trained, tmp_path):
    """Those of a namespace are fetched from other people's repositories."""
    shutil.copytree(trained, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["source"] = "tfds('someone:digits')"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    sentence = mistake("evaluate", f"--workdir={tmp_path}/run", log=r"^\d\d:\d\d:\d\d")
    assert has(sentence, "names data set 'someone:digits'", "fetch a program and run it", "add --trust")


def test_trusted(trained, tmp_path, monkeypatch, capsys):
    """With --trust it is imported, from the folder of the config or the current one."""
    shutil.copytree(trained, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "my_trusted_nets.py").write_text("from imgclf_jax.models.backbones import MLP as Net\n")
    config["model"] = "my_trusted_nets:Net(widths=(512,))"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert launch.main(["evaluate", f"--workdir={tmp_path}/run", "--trust"]) == 0
    assert "test: examples 64" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["the current folder", "the folder of the config"])
def test_a_file_that_is_called_like_a_library(tmp_path, place):
    """What is installed comes first."""
    for name in ("optax", "jax", "absl", "ml_collections", "os"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "digits.py").read_text())
    config = [f"--config={tmp_path}/mine.py"] if place == "the folder of the config" else []
    where = ROOT if config else tmp_path
    command = [sys.executable, str(ROOT / "launch.py"), *config, f"--workdir={tmp_path}/run", "--config.model=none"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("error: unknown model 'none'")
