"""Names that contain more than letters."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imgclf_jax.core.text import decimals, one_per_line, printable

ROOT = Path(__file__).parents[2]
# What Python makes of the C locale by itself is UTF-8, unless it is told not to.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


@pytest.mark.parametrize(("name", "shown"), [
    ("é漢 a[b]\\c.png", "é漢 a[b]\\c.png"),
    ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
    ("a\nb\tc\r", r"a\nb\tc\r"),
    ("\u202egnp.exe", r"\u202egnp.exe"),  # turns the direction of writing
    ("\udcff.png", r"\udcff.png"),  # a byte that is no UTF-8
    ("\x9b31m", r"\x9b31m"),  # one character that begins an escape sequence
])  # fmt: skip
def test_escapes(name, shown):
    assert printable(name) == shown


def test_names_on_a_line_each():
    assert one_per_line(["a\nb", "c\r\n", "\udcff", "é"]) == "a\\nb\nc\\r\\n\n\\udcff\né"


def shell(command, **environment):
    """Returns (status, standard output, standard error) of a command line."""
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    done = subprocess.run(command, shell=True, capture_output=True, env=environment, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_output_that_cannot_be_written():
    status, _, err = shell("$PYTHON launch.py config >/dev/full")
    assert (status, err.count(b"\n")) == (1, 1)
    assert err.startswith(b"error: standard output or a file: No space left on device")


def test_output_in_ascii_has_escapes():
    status, out, err = shell("$PYTHON launch.py config --config.data.source='é漢'", **ASCII)
    assert (status, err) == (0, b"")
    out.decode("ascii")


@pytest.mark.parametrize(("value", "shown"), [
    (1.0, "1.0000"), (0.99994, "0.9999"), (0.99996, ">0.9999"), (float(np.nextafter(np.float32(1), 0)), ">0.9999"),
    (0.0, "0.0000"), (1e-9, "<0.0001"), (0.00006, "0.0001"), (-1e-9, "-0.0000"), (12.34567, "12.3457"),
    (1.00001, "1.0000"), (math.nan, "nan"), (math.inf, "inf"),
])  # fmt: skip
def test_what_is_not_one_is_not_shown_as_one(value, shown):
    assert decimals(value) == shown
