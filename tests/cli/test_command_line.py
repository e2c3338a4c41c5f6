"""A command line is parsed; a wrong one is answered by what to type instead, before JAX is imported if it can be."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from imgclf_jax import config as configs
from imgclf_jax.cli import arguments, distributed, table
from imgclf_jax.cli.command_line import override
from imgclf_jax.cli.main import main
from imgclf_jax.core import extras
from imgclf_jax.core.errors import UsageError, UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda': no plugin")])
def test_a_platform_that_is_not_here(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr("jax.devices", devices)
    with pytest.raises(UserError, match=r"JAX finds no devices .*JAX_PLATFORMS") as e, distributed.started({}):
        pass
    assert str(error) in str(e.value)


def test_another_process_that_dies_ends_this_one_with_a_sentence(monkeypatch):
    def compute():
        with distributed.started({}):
            raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    with pytest.raises(ValueError, match="Gloo"):  # of a single process
        compute()
    monkeypatch.setattr("imgclf_jax.core.processes.count", lambda: 2)
    with pytest.raises(UserError, match="another process of this run has died"):
        compute()


OLDER = "import runpy, sys; sys.version_info = (3, 11, 9); runpy.run_path('launch.py', run_name='__main__')"


@pytest.mark.parametrize(("argv", "said", "fix"), [
    (["-c", OLDER], "imgclf_jax needs Python 3.12 or later, and ", ""),
    (["launch.py", "--help"], f"{sys.executable} has no package ", "run `uv run launch.py`"),
])  # fmt: skip
def test_a_python_that_is_older_or_has_no_packages_is_told(argv, said, fix):
    command = [sys.executable, "-S", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {said}")
    assert fix in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_of_the_installed_package_has_nothing_of_a_clone(capsys):
    """Its examples can be typed in any folder: they named configs/folder.py, which only a clone has."""
    for words in (["--help"], *([name, "--help"] for name in table.COMMANDS)):
        assert main(words, "imgclf") == 0
        text = capsys.readouterr().out
        assert "launch.py" not in text.replace("uv run launch.py", ""), words
        assert "configs/" not in text, words
        assert max(map(len, text.splitlines())) <= 80, words


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
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(configs.to_json(configs.default_config()))
    refused = [words for words in REFUSED if words.split()[0] in table.COMMANDS]  # a tool may have been deleted
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(ROOT)], cwd=tmp_path, capture_output=True, text=True,
                          input=json.dumps([words.split() for words in refused]), check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words, (status, said) in zip(refused, json.loads(done.stdout), strict=True):
        assert said.startswith(f"error: {REFUSED[words]}"), (words, said)
        assert (status, said.count("\n")) in ((1, 1), (2, 2)), (words, said)


@pytest.mark.parametrize("extra", sorted(extras._MODULES))
def test_how_to_install_an_extra(extra):
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
    line = arguments.parse(argv, "launch.py", [])
    assert (line.command, line.workdir, line.options["top_k"]) == ("predict", "r", 2)
    assert line.files == ["a.png", "-", "b.png", "c.png", "-x"]
    assert line.overrides == [("seed", "-3"), ("total", "5 epochs"), ("deterministic", "False")]


@pytest.mark.parametrize("argv", [[], ["--workdir=r"], ["train"]])
def test_training_is_the_default(argv):
    line = arguments.parse(argv, "launch.py", [])
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
