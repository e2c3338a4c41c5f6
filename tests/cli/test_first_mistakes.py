"""What a newcomer types first and wrongly: each answer names what to type instead."""

import subprocess
import sys
from pathlib import Path

import pytest

import launch
from imgclf_jax import config as configs
from imgclf_jax.cli import distributed, table
from imgclf_jax.cli.main import main
from imgclf_jax.core.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def says(capsys, monkeypatch, tmp_path):
    """Runs a command line in an empty folder; gives (exit status, what it says)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        status = launch.main(list(argv))
        return status, capsys.readouterr().err.splitlines()[0].removeprefix("error: ")

    return run


@pytest.mark.parametrize(("argv", "said"), [
    (["evaluate", "runs/photos"], "evaluate takes no files, but got 'runs/photos': if that is a run, pass "
     "--workdir=runs/photos"),
    (["train", "batch_size=4"], "train does not take 'batch_size=4': it is a config key: write "
     "--config.batch_size=VALUE"),
    (["--config.seed", "--workdir=a"], "--config.seed needs a value: write --config.seed=VALUE"),
    (["status", "runs", "--config.seed=3"], "status takes no config, but got --config.seed"),
    (["reproduce", "--workdir=runs/a"], "reproduce takes directories without a flag: write reproduce runs/a"),
    (["train", "digits"], "train takes no files, but got 'digits': if that is a config, pass --config=digits"),
    (["probe", "--checkpoint=best", "--config.init_from=w.pth"], "probe loads a run (--workdir, --checkpoint) or "
     "weights (--config.init_from), not both; drop either"),
])  # fmt: skip
def test_a_name_or_a_place_that_is_another_one_here(says, argv, said):
    assert says(*argv) == (2, said)


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda': no plugin")])
def test_a_platform_that_is_not_here(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr("jax.devices", devices)
    with pytest.raises(UserError, match=r"JAX finds no devices .*JAX_PLATFORMS") as e, distributed.started({}):
        pass
    assert str(error) in str(e.value)


def test_another_process_that_dies_ends_this_one_with_a_sentence(monkeypatch):
    """JAX raises the error of a collective."""

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


@pytest.mark.parametrize(("name", "said"), [
    ("digts", "unknown config 'digts': did you mean 'digits'? allowed: cifar10_airbench, cifar10_resnet20, digits, "),
    ("configs/folder.py:photos", "unknown config 'configs/folder.py': did you mean 'folder'? allowed: "),
])  # fmt: skip
def test_a_config_that_is_not_there(says, name, said):
    status, words = says("config", f"--config={name}")
    assert (status, words[: len(said)]) == (1, said)


@pytest.mark.parametrize("words", [["predict", "cat.jpg", "--workdir=a"], ["report", "--workdir=a"]])
def test_a_config_that_the_command_does_not_use(words, tmp_path, says):
    """A run keeps the config it was trained with: another one was ignored silently, and its data not evaluated."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(configs.to_json(configs.default_config()))
    (tmp_path / "cat.jpg").touch()
    assert says(*words, "--config=digits") == (2, f"{words[0]} uses the config that the run in a has recorded: drop "
                                                  "--config, and change a key by --config.KEY=VALUE")  # fmt: skip
