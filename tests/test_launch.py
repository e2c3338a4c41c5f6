"""What the command line prepares before JAX is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import launch

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


def run(cache: str, workdir: Path) -> dict:
    """Trains two steps with `cache` as the user's cache folder; how often the compilation cache hit and missed."""
    arguments = [f"--workdir={workdir}", "--config.total=2 steps", "--config.schedule=constant(1e-3)",
                 "--config.data.source=fake(64)", "--config.data.placement=device",
                 "--config.model=mlp(widths=(16,))"]  # fmt: skip
    hidden = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"XDG_CACHE_HOME": cache}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_second_run_compiles_nothing(tmp_path):
    """The compilation cache is on by default, hits for every program of the second run, and changes no bit."""
    first, second = (run(str(tmp_path / "cache"), tmp_path / name) for name in ("a", "b"))
    assert first["cache_misses"] > 0
    assert "cache_misses" not in second
    assert second["cache_hits"] > 0
    digests = [json.loads((tmp_path / name / "result.json").read_text())["params_sha256"] for name in ("a", "b")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source=folder(3)", "data.source='folder(3)' fails: "),
        ("data.source=fake(8, 3)", "fake(shape=3): shape is (height, width, channels)"),
        ("preprocess=decode(1)|resize('x')", "preprocess=\"decode(1)|resize('x')\" fails: "),
    ],
)
def test_an_argument_of_the_wrong_type(tmp_path, capsys, override, message):
    """One sentence that names the key, for the built-in sources and host ops too."""
    assert launch.main([f"--workdir={tmp_path / 'run'}", f"--config.{override}"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
