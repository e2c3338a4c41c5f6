"""A command line is parsed, and what it names in vain is refused before JAX is imported."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from imgclf_jax import config as configs
from imgclf_jax.cli.arguments import parse
from imgclf_jax.cli.command_line import override
from imgclf_jax.cli.table import COMMANDS
from imgclf_jax.core import extras
from imgclf_jax.core.errors import UsageError, UserError

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


def test_flags_keys_and_files_may_be_mixed():
    argv = ["predict", "a.png", "--config.seed", "-3", "--workdir", "r", "-", "--config.total=5 epochs", "b.png",
            "--config.deterministic", "False", "--top_k=2", "c.png", "--", "-x"]  # fmt: skip
    line = parse(argv, "launch.py", [])
    assert (line.command, line.workdir, line.options["top_k"]) == ("predict", "r", 2)
    assert line.files == ["a.png", "-", "b.png", "c.png", "-x"]
    assert line.overrides == [("seed", "-3"), ("total", "5 epochs"), ("deterministic", "False")]


@pytest.mark.parametrize("argv", [[], ["--workdir=r"], ["train"]])
def test_training_is_the_default(argv):
    line = parse(argv, "launch.py", [])
    assert (line.command, line.names_config, line.options["heartbeat"]) == ("train", False, 100)
    assert line.config_file.endswith("configs/digits.py")


def test_values_have_the_types_of_their_keys():
    config = configs.default_config()
    override(config, {"seed": "3", "clip": "1", "deterministic": "f", "rules.lr": "a=1", "data.eval": "{}",
                      "data.eval.new-set": "train", "data.extra.crops": "test"}.items())  # fmt: skip
    flat = configs.flatten(config)
    assert [flat[key] for key in ("seed", "clip", "deterministic", "rules.lr")] == [3, 1.0, False, "a=1"]
    assert (flat["data.eval"], flat["data.extra"]) == ({"new-set": "train"}, {"crops": "test"})
    configs.validate(config)


@pytest.mark.parametrize(("key", "text"), [
    ("seed", "1.5"), ("clip", "x"), ("deterministic", "no"), ("data.eval", "['a']"), ("data.eval", "{'a': 1}"),
    ("data.eval", "{"), ("rules", "a"), ("data.train.x", "a"),
])  # fmt: skip
def test_values_of_other_types_and_unknown_keys(key, text):
    with pytest.raises(UsageError, match=key):
        override(configs.default_config(), [(key, text)])
