"""What a command line names in vain is refused before JAX is imported."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from imgclf_jax import config as configs
from imgclf_jax.cli.table import COMMANDS
from imgclf_jax.core import extras
from imgclf_jax.core.errors import UserError

ROOT = Path(__file__).parents[2]

# What is missing here: JAX, which must not be imported, and what a plain install lacks.
PROGRAM = """
import contextlib, io, json, sys
for name in ("jax", "fastapi", "uvicorn", "matplotlib", "jax2onnx", "tensorflow", "tensorflow_datasets"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import launch
said = []
for words in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        status = launch.main(words)
    said.append([status, err.getvalue()])
print(json.dumps(said))
"""
REFUSED = {
    "predict no.jpg --workdir=run": "images: there is no file or directory 'no.jpg' (working directory: ",
    "predict x*.jpg --workdir=run": "'x*.jpg' has no images",
    "predict --config.seed 3 --workdir=run -- -x.png": "images: there is no file or directory '-x.png'",
    "evaluate --workdir=no": "no holds no run: there is no no/config.json; train first, or pass the run's --workdir",
    "evaluate": "runs/digits holds no run: there is no ",
    "export a.xyz --workdir=run": "export: 'a.xyz': the suffix must select the format",
    "export no/a.stablehlo --workdir=run": "export: the folder no does not exist; create it first",
    "export a.onnx --workdir=run": "export: a.onnx needs jax2onnx",
    "export a.savedmodel --workdir=run": "export: a.savedmodel needs tensorflow, which is not installed; run it by",
    "serve --workdir=run": "serve needs fastapi, uvicorn, which are not installed; run it by `uv run --extra serve ",
    "dryrun --chips=v5e": "--chips=v5e: allowed: ",
    "find-lr --config=none": "unknown config 'none': ",
}


def test_what_can_be_checked_at_once_is_checked_before_jax_is_imported(tmp_path):
    """`predict no.jpg` took seconds."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(configs.to_json(configs.default_config()))
    refused = [words for words in REFUSED if words.split()[0] in COMMANDS]  # a tool may have been deleted
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(ROOT)], cwd=tmp_path, capture_output=True, text=True,
                          input=json.dumps([words.split() for words in refused]), check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words, (status, said) in zip(refused, json.loads(done.stdout), strict=True):
        assert said.startswith(f"error: {REFUSED[words]}"), (words, said)
        assert (status, said.count("\n")) == (1, 1), (words, said)


@pytest.mark.parametrize("extra", sorted(extras._MODULES))
def test_how_to_install_an_extra(extra):
    """pyproject.toml has an extra or a dependency group of this name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    kind, names = "extra", project["project"]["optional-dependencies"]
    if extra == "onnx":  # conflicts with the others
        kind, names = "group", project["dependency-groups"]
    assert extra in names
    with pytest.raises(UserError, match=f"run it by `uv run --{kind} {extra} launch.py …`"):
        extras.require(extra, "it", "no_such_module")
