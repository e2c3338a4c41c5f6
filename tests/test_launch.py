"""What the command line prepares before JAX is imported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import thorough

import imgclf_jax
from imgclf_jax import config as configs
from imgclf_jax.cli import table

ROOT = Path(__file__).parent.parent

PROGRAM = """
import collections, json, sys
import launch
events = collections.Counter()
from imgclf_jax.run import environment
environment.prepare(True)
import jax
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition('/')[2]]))
status = launch.main(sys.argv[1:])
print(json.dumps({"status": status, **events}))
"""


def user_environment(cache: str, **more: str) -> dict[str, str]:
    """That of this process with `cache` as the user's cache folder, without the tests' own compilation cache."""
    ours = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    return {k: v for k, v in os.environ.items() if k not in ours} | {"XDG_CACHE_HOME": cache, **more}


def run(cache: str, workdir: Path) -> dict:
    """Trains two steps with `cache` as the user's cache folder; returns hits and misses of the compilation cache."""
    arguments = [f"--workdir={workdir}", "--config.total=2 steps", "--config.schedule=constant(1e-3)",
                 "--config.data.source=fake(64)", "--config.data.placement=device",
                 "--config.model=mlp(widths=(16,))"]  # fmt: skip
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=user_environment(cache), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


FIRST_IMPORT = """
import json, os, sys
import launch

class Reached(BaseException):
    pass

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "jax":
            raise Reached

sys.meta_path.insert(0, Finder())
found = {}
for words in json.load(sys.stdin):
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    try:
        launch.main(words)
    except Reached:
        found[words[0]] = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
print(json.dumps(found))
"""


def test_the_compilation_cache_is_on_before_any_command_imports_jax(tmp_path):
    """JAX reads its location at import, whether a command or the reader of its work directory imports it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(configs.to_json(configs.default_config()))
    (tmp_path / "config.py").write_text("import jax\n")
    commands = [name for name in table.COMMANDS if name not in ("config", "sweep")]
    run, image = str(tmp_path / "run"), str(tmp_path / "a.png")
    Path(image).touch()
    files = {"compare": [run], "status": [run], "find-lr": [], "reproduce": [run]}
    more = {"dryrun": ["--chips=cpu:1"], "predict": [image], "explain": [image], "export": [f"{run}.stablehlo"],
            "features": [f"--output={run}.npz"]}  # fmt: skip
    calls = [[name, *files.get(name, []), *more.get(name, []), *([] if name in files else
              [f"--workdir={tmp_path / 'run'}"])] for name in commands]  # fmt: skip
    calls.append(["config", f"--config={tmp_path / 'config.py'}"])
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FIRST_IMPORT], cwd=ROOT, env=environment, input=json.dumps(calls),
                          capture_output=True, text=True, check=True)  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {*commands, "config"}
    assert {name for name, folder in found.items() if not folder.startswith(str(tmp_path))} == set()


@pytest.mark.slow
def test_the_second_run_compiles_nothing(tmp_path):
    """The compilation cache is on by default, hits for every program of the second run, and changes no bit."""
    first, second = (run(str(tmp_path / "cache"), tmp_path / name) for name in ("a", "b"))
    assert first["cache_misses"] > 0
    assert "cache_misses" not in second
    assert second["cache_hits"] > 0
    digests = [json.loads((tmp_path / name / "result.json").read_text())["params_sha256"] for name in ("a", "b")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("named", ["the environment's", *thorough("PYTHONPATH's")])
def test_the_package_beside_launch_py_is_the_one_that_runs(tmp_path, named):
    """A clone run in another clone's environment used the other's package, with PYTHONPATH too."""
    other, mark = tmp_path / "other", "Directory of the other clone's data"
    other.mkdir()
    shutil.copy(ROOT / "launch.py", other)
    for folder in ("imgclf_jax", "configs"):
        shutil.copytree(ROOT / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__"))
    keys = other / "imgclf_jax" / "config.py"
    keys.write_text(keys.read_text().replace("Directory or bucket of prepared TFDS data", mark))
    environment = os.environ | {"PYTHONPATH": str(other if named == "PYTHONPATH's" else "")}
    for clone in (other, ROOT):
        command = [sys.executable, str(clone / "launch.py"), "config"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert (mark in done.stdout) == (clone == other)


def test_the_installed_package_has_the_same_command_line(tmp_path):
    """`python -m imgclf_jax` works like the script `imgclf`: configs by name, and its own name in help texts."""

    def run(*words):
        command = [sys.executable, "-m", "imgclf_jax", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert run("--version").stdout == f"imgclf_jax {imgclf_jax.__version__}\n"
    assert run("evaluate", "--help").stdout.startswith("usage: python -m imgclf_jax evaluate [flags]")
    assert "data.source = 'digits'" in run("config", "--config", "digits").stdout
