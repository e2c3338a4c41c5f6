"""What the command line prepares before JAX is imported."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import imgclf_jax

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


@pytest.mark.parametrize("start", ["path('launch.py'", "module('imgclf_jax'"])
def test_ctrl_c_during_the_imports_is_no_traceback(start):
    program = f"""if True:
        import os, runpy, signal, sys
        class Finder:
            def find_spec(self, name, *_):
                if name == "imgclf_jax.cli":
                    os.kill(os.getpid(), signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also if a shell has it ignored
        sys.meta_path.insert(0, Finder())
        runpy.run_{start}, run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_programs_compiled_for_one_core_are_not_run_on_two(tmp_path):
    """XLA compiles loops without parts for one core, and JAX's key of the cache is the same."""

    def folder(cores: set[int]) -> str:
        program = f"import os\nos.sched_getaffinity = lambda pid: {cores}\n"
        program += "from imgclf_jax.run import environment; environment.prepare()\n"
        program += "print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
        return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=user_environment(str(tmp_path)),
                              capture_output=True, text=True, check=True).stdout  # fmt: skip

    assert folder({0, 1}) == folder({0, 1}) != folder({0})


@pytest.mark.slow
def test_the_second_run_compiles_nothing(tmp_path):
    """The compilation cache is on by default, hits for every program of the second run, and changes no bit."""
    first, second = (run(str(tmp_path / "cache"), tmp_path / name) for name in ("a", "b"))
    assert first["cache_misses"] > 0
    assert "cache_misses" not in second
    assert second["cache_hits"] > 0
    digests = [json.loads((tmp_path / name / "result.json").read_text())["params_sha256"] for name in ("a", "b")]
    assert digests[0] == digests[1]


def test_the_package_beside_launch_py_is_the_one_that_runs(tmp_path):
    other, mark = tmp_path / "other", "Directory of the other clone's data"
    other.mkdir()
    shutil.copy(ROOT / "launch.py", other)
    for folder in ("imgclf_jax", "configs"):
        shutil.copytree(ROOT / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__"))
    keys = other / "imgclf_jax" / "config.py"
    keys.write_text(keys.read_text().replace("Directory or bucket of prepared TFDS data", mark))
    environment = os.environ | {"PYTHONPATH": str(other)}
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
    assert run("train", "--help").stdout.startswith("usage: python -m imgclf_jax train [flags]")
    assert "data.source = 'digits'" in run("config", "--config", "digits").stdout
