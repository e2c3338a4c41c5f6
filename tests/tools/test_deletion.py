"""Each tool that no other builds on can be deleted: its folder, and its entry in the command table."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from test_structure import FILES, ROOT, SHARED_TOOLS, tool_of

from imgclf_jax.cli import table

TOOLS = sorted({tool_of(name) for name in FILES} - {"", *SHARED_TOOLS})


def without(tool, folder):
    """Copies the tree without the tool, its commands and its tests."""
    for name in ("imgclf_jax", "configs", "tests", "launch.py", "pyproject.toml", "README.md"):
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
    shutil.rmtree(folder / "imgclf_jax" / "tools" / tool)
    shutil.rmtree(folder / "tests" / "tools" / tool, ignore_errors=True)
    file = folder / "imgclf_jax" / "cli" / "table.py"
    lines, gone = file.read_text().splitlines(), set()
    commands = {name for name, command in table.COMMANDS.items() if tool_of(command.module) == tool}
    assert commands
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in commands and isinstance(value, ast.Call):
                    gone.update(range(key.lineno - 1, value.end_lineno))
    file.write_text("\n".join(line for number, line in enumerate(lines) if number not in gone) + "\n")
    return commands


def run(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.thorough
@pytest.mark.parametrize("tool", TOOLS)
def test_all_else_is_whole_without_a_tool(tool, tmp_path):
    """Every other module imports, and the help lists the other commands."""
    gone = without(tool, tmp_path)
    needs_more = ("tools.export", "tools.serve")  # extras that need not be installed
    names = [name for name in FILES if tool_of(name) != tool and not name.startswith(needs_more) and name != "launch"]
    modules = [f"imgclf_jax.{name}".rstrip(".") for name in names]
    run(tmp_path, "-c", f"import importlib\nfor name in {modules!r}: importlib.import_module(name)")
    listed = {line.split()[0] for line in run(tmp_path, "launch.py", "--help").splitlines() if line.startswith("  ")}
    assert not gone & listed
    assert {"train", *table.COMMANDS} - gone <= listed
