"""What a newcomer types first and wrongly: each answer names what to type instead."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from imgclf_jax import config as configs
from imgclf_jax.cli import arguments, distributed, table
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
    (["--batch_size=4"], "train does not take '--batch_size=4': it is a config key: write --config.batch_size=VALUE"),
    (["--config.seed", "--workdir=a"], "--config.seed needs a value: write --config.seed=VALUE"),
    (["status", "runs", "--config.seed=3"], "status takes no config, but got --config.seed"),
])  # fmt: skip
def test_a_name_or_a_place_that_is_another_one_here(says, argv, said):
    assert says(*argv) == (2, said)


def test_an_error_in_own_code_keeps_its_place(monkeypatch, tmp_path, capfd):
    """It ended with "a file or the output: …", and a blank line on standard output."""
    (tmp_path / "broken_h5.py").write_text("def source():\n    raise OSError('Unable to open my.h5')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    argv = ["show-batch", "--config.data.source=broken_h5:source", "--format=json"]
    with pytest.raises(OSError, match=r"my\.h5") as e:
        launch.main(argv)
    assert e.traceback[-1].path.name == "broken_h5.py"
    monkeypatch.setattr("imgclf_jax.run.provenance.own_files", dict)  # as if it were a library's
    assert launch.main(argv) == 1
    out, err = capfd.readouterr()
    assert (out, "error: standard output or a file: Unable to open my.h5" in err) == ("", True)


def test_values_after_their_keys_are_no_files(says):
    """`--config.seed 3` is a key and its value."""
    status, said = says("config", "--config.seed", "3", "--config.batch_size", "-1")
    assert (status, said) == (1, "batch_size=-1: must be 1 or more")


@pytest.mark.parametrize(("words", "shown"), [
    (["--config.deterministic", "False"], False), (["--config.deterministic", "true"], True),
    (["--config.deterministic=false"], False),
])  # fmt: skip
def test_a_value_of_true_or_false_after_its_key(capsys, words, shown):
    assert launch.main(["config", "--config.deterministic=True", *words, "--config.seed", "3"]) == 0
    assert {f"deterministic = {shown}", "seed = 3"} <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("argv", [["predict", "cat.jpg"], ["evaluate"], ["report"], ["serve"]])
def test_no_run_is_named_and_there_is_none(says, tmp_path, argv):
    (tmp_path / "cat.jpg").touch()
    status, said = says(*argv)
    assert status == 1
    assert said == (f"{argv[0]} needs a run: pass --workdir=DIR; the default, runs/digits, holds no run")


def test_no_run_is_named_and_the_usual_one_is_used(says, tmp_path):
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "config.json").write_text("{}")
    (tmp_path / "cat.jpg").touch()
    assert says("predict", "cat.jpg")[1] == "without --workdir: using the run in runs/digits"


def test_a_folder_without_a_run_is_named(says, tmp_path):
    assert "there is no elsewhere/config.json" in says("evaluate", "--workdir=elsewhere")[1]
    assert "there is no config.json" in says("reproduce", ".")[1]


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


def test_launch_py_can_be_read_by_an_older_python():
    """So that it can say which one it needs."""
    ast.parse((ROOT / "launch.py").read_text(), feature_version=(3, 8))


def launched(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else [str(ROOT / "launch.py")]
    return subprocess.run(
        [sys.executable, "-S", *program, *words], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_an_older_python_is_told():
    code = "import runpy, sys; sys.version_info = (3, 11, 9); runpy.run_path('launch.py', run_name='__main__')"
    done = launched(code=code)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: imgclf_jax needs Python 3.12 or later, and ")
    assert done.stderr.count("\n") == 1


def test_a_python_without_the_packages_is_told():
    done = launched("--help")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {sys.executable} has no package ")
    assert "run `uv run launch.py`" in done.stderr
    assert done.stderr.count("\n") == 1


def helps():
    """The help texts: of the program, and of each command."""
    parser = arguments.build("launch.py")
    own = parser._subparsers._group_actions[0].choices
    assert own.keys() == table.COMMANDS.keys()
    return [parser.format_help(), *(one.format_help() for one in own.values())]


def test_help_of_the_installed_package_has_nothing_of_a_clone(capsys):
    """Its examples can be typed in any folder: they named configs/folder.py, which only a clone has."""
    for words in (["--help"], *([name, "--help"] for name in table.COMMANDS)):
        assert main(words, "imgclf") == 0
        text = capsys.readouterr().out
        assert "launch.py" not in text.replace("uv run launch.py", ""), words
        assert "configs/" not in text, words


@pytest.mark.parametrize(("name", "said"), [
    ("digts", "unknown config 'digts': did you mean 'digits'? allowed: cifar10_airbench, cifar10_resnet20, digits, "),
    ("airbench", "unknown config 'airbench': did you mean 'cifar10_airbench'? allowed: "),
    ("configs/folder.py:photos", "unknown config 'configs/folder.py': did you mean 'folder'? allowed: "),
    ("digits.py", "unknown config 'digits.py': did you mean 'digits'? allowed: "),
])  # fmt: skip
def test_a_config_that_is_not_there(says, name, said):
    status, words = says("config", f"--config={name}")
    assert (status, words[: len(said)]) == (1, said)


def test_a_folder_does_not_hide_the_config_of_its_name(says, tmp_path):
    (tmp_path / "digits").mkdir()
    assert says("config", "--config=digits", "--config.batch_size=0") == (1, "batch_size=0: must be 1 or more")


def test_help_says_once_what_is_true_of_all_commands():
    overview, *own = helps()
    assert "exit status: 0 done" in overview
    for text in own:
        assert "75 stopped by a signal" not in text
        assert "--workdir" not in text or "(default: runs/<config name>" in " ".join(text.split())


@pytest.mark.parametrize(
    "words", [["predict", "cat.jpg", "--workdir=a"], ["report", "--workdir=a"], ["reproduce", "a"]]
)
def test_a_config_that_the_command_does_not_use(words, tmp_path, says):
    """A run keeps the config it was trained with: another one was ignored silently, and its data not evaluated."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(configs.to_json(configs.default_config()))
    (tmp_path / "cat.jpg").touch()
    assert says(*words, "--config=digits") == (2, f"{words[0]} uses the config that the run in a has recorded: drop "
                                                  "--config, and change a key by --config.KEY=VALUE")  # fmt: skip
