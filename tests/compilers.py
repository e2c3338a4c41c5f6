"""What a program prints that compiles for chips that are not here, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imgclf_jax.core import extras

ROOT = Path(__file__).parents[1]

# What every program begins with: the chips to compile for, before anything imports JAX.
BEGIN = """
import json, sys
from imgclf_jax.tools.dryrun import topology

chips = topology.parse(sys.argv[1])
topology.prepare(chips)

import jax
import numpy as np
from imgclf_jax.config import default_config
from imgclf_jax.core import sharding
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.tools.dryrun import counts
"""


def skip_without(chips: str) -> None:
    """Skips the test where the compiler for these chips is not installed."""
    topology = pytest.importorskip("imgclf_jax.tools.dryrun.topology")
    platform = topology.parse(chips).platform
    if (extra := topology._COMPILERS.get(platform)) and extras.missing(extra):
        pytest.skip(f"needs a compiler: uv run --isolated --extra {extra} pytest -m chips")


def printed(program: str, chips: str, *arguments: str) -> Any:
    """The last line that `program` prints after BEGIN, as JSON. It gets the chips' name and the arguments."""
    skip_without(chips)
    variables = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")}
    ran = subprocess.run(
        [sys.executable, "-c", BEGIN + program, chips, *arguments], env={**variables, "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])
