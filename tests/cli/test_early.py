"""What a command line names in vain is refused before JAX is imported."""

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from imgclf_jax import config as configs
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
    "predict no.jpg --workdir=run": "predict: there is no file or directory 'no.jpg' (working directory: ",
    "predict x*.jpg --workdir=run": "predict: the pattern 'x*.jpg' matches no file",
    "predict --workdir=run": "predict: name at least one image",
    "predict --config.seed 3 --workdir=run -- -x.png": "predict: there is no file or directory '-x.png'",
    "explain no.jpg --workdir=run": "explain: there is no file or directory 'no.jpg'",
    "features no.jpg --workdir=run --output=a.npz": "features: there is no file or directory 'no.jpg'",
    "features --workdir=run": "features: name the file to write: --output FILE.npz",
    "evaluate --workdir=no": "no holds no run: there is no ",
    "evaluate": "evaluate needs a run: pass --workdir=DIR; the default, ",
    "evaluate --workdir=run --predictions=no/a.csv": "--predictions=no/a.csv: the directory 'no' does not exist",
    "report --workdir=run --html=no/a.html": "--html=no/a.html: the directory 'no' does not exist; create it first",
    "compare run --html=no/a.html": "--html=no/a.html: the directory 'no' does not exist; create it first",
    "compare no": "no is not a directory; name work directories",
    "status no": "no is not a directory; name work directories",
    "reproduce no": "no holds no run: there is no ",
    "reproduce run/none.zip": "run/none.zip holds no run: there is no ",
    "export a.xyz --workdir=run": "export: 'a.xyz': the suffix must select the format",
    "export no/a.stablehlo --workdir=run": "export: the folder no does not exist; create it first",
    "export a.onnx --workdir=run": "export: a.onnx needs jax2onnx",
    "export a.savedmodel --workdir=run": "export: a.savedmodel needs tensorflow, which is not installed; run it by",
    "serve --workdir=run": "serve needs fastapi, uvicorn, which are not installed; run it by `uv run --extra serve ",
    "probe --workdir=run --plot=a.png": "--plot=a.png needs matplotlib, which is not installed; run it by",
    "dryrun --chips=v5e": "--chips=v5e: allowed: ",
    "--config=folder:no": "folder: there is no directory 'no' (working directory: ",
    "--config=folder": "--config=folder takes an argument: write --config=folder:PATH",
    "--config=medical": "--config=medical takes an argument: write --config=medical:PATH",
    "show-batch --config=faces:no": "folder: there is no directory 'no'",
    "find-lr --config=traffic_signs:no": "folder: there is no directory 'no'",
    "--config.init_from=no.pth": "init_from: there is no file or work directory 'no.pth'",
    "evaluate --config=digits --config.init_from=no.pth": "init_from: there is no file or work directory 'no.pth'",
    "--config.data.source=table('no.csv')": "table: there is no file 'no.csv'",
    "--config.data.source=arrays(path='no.npz')": "arrays: there is no file 'no.npz'",
    "--config.data.eval.new=folder('no')/train": "folder: there is no directory 'no'",
    "--config.data.extra.new=folder('no')": "folder: there is no directory 'no'",
    "--config.method=distill('no')": "distill: there is no directory 'no'",
    "--config=mnist": "tfds('mnist') needs tensorflow_datasets, which is not installed; run it by",
    "--config=transfer:run --config.data.source=folder('no')": "folder: there is no directory 'no'",
}


def test_what_can_be_checked_at_once_is_checked_before_jax_is_imported(tmp_path):
    """`predict no.jpg` took seconds, and `init_from` was refused after the scan of the data."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(configs.to_json(configs.default_config()))
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(ROOT)], cwd=tmp_path, capture_output=True, text=True,
                          input=json.dumps([words.split() for words in REFUSED]), check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (words, sentence), (status, said) in zip(REFUSED.items(), json.loads(done.stdout), strict=True):
        assert said.startswith(f"error: {sentence}"), (words, said)
        assert (status, said.count("\n")) == (1, 1), (words, said)


def test_a_run_that_resumes_needs_its_first_weights_no_more(tmp_path):
    from imgclf_jax.cli import openers

    config = configs.default_config()
    config.init_from = str(tmp_path / "gone.pth")
    openers.check_data("configs/digits.py", config, starts=False)
    with pytest.raises(UserError, match=r"init_from: there is no file or work directory '.*gone\.pth'"):
        openers.check_data("configs/digits.py", config, starts=True)


@pytest.mark.parametrize("source", ["my_nets:folder('no')", "folder('s3://bucket/no')", "digits"])
def test_sources_that_only_their_own_code_knows_are_left_to_it(source):
    from imgclf_jax.cli import openers

    config = configs.default_config()
    config.data.source = source
    openers.check_data("configs/digits.py", config, starts=True)


def test_a_path_with_quotes_is_read_as_python_reads_it(tmp_path):
    from imgclf_jax.cli import openers

    config = configs.default_config()
    (tmp_path / 'it\'s "mine"').mkdir()
    config.data.source = f"folder({str(tmp_path / 'it\'s "mine"')!r})"
    openers.check_data("configs/digits.py", config, starts=True)


@pytest.mark.parametrize("extra", sorted(extras._MODULES))
def test_how_to_install_an_extra(extra, monkeypatch):
    """A message named `imgclf_jax[EXTRA]`, which no registry has."""
    group = extra == "onnx"
    assert extras.how_to_install(extra) == f"run it by `uv run --{'group' if group else 'extra'} {extra} launch.py …`"
    monkeypatch.setattr(extras, "_CLONE", Path("none"))  # as in an installed package
    command = re.fullmatch("install it by `pip install (.*)`", extras.how_to_install(extra))[1]
    packages = shlex.split(command.removesuffix(" && pip install --no-deps jax2onnx"))
    known = {text.partition(";")[0].strip() for text in importlib.metadata.requires("imgclf_jax")}
    assert packages
    assert {*packages} <= known
    assert command.endswith("--no-deps jax2onnx") == group


def test_a_python_that_an_extra_does_not_support(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["tensorflow>=2; extra == 'tfds' and "
                                                                      "python_version < '3'"])  # fmt: skip
    assert re.fullmatch(r"its packages do not support Python 3\.\d+ yet: use an older one",
                        extras.how_to_install("tfds"))  # fmt: skip
