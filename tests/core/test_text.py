"""Names of any characters, tables, JSON, log lines and progress: nothing is lost, and no name controls a terminal."""

import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from imgclf_jax.core import terminal
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


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("screen", [Screen, io.StringIO])
def test_a_table_loses_nothing(monkeypatch, screen):
    """On a terminal cells go on in the next line; in a file a row is one line, for programs."""
    shown = screen()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("COLUMNS", "60")
    terminal.print_table(["file", "top 1"], iter([["x" * 3000, "z" * 50]]))
    text = shown.getvalue()
    assert (text.count("x"), text.count("z")) == (3000, 50)
    assert (len(text.splitlines()[-1]) == 60) == (screen is Screen)
    assert (f"│ {'x' * 3000} │ {'z' * 50} │" in text) == (screen is io.StringIO)
    terminal.print_table(
        ["file", "top 1", "top 2"], [["photos/of/img_2.jpeg", "Sonnenblume 0.9876", "Gänseblümchen 0.01"]]
    )
    assert all(whole in shown.getvalue() for whole in ("img_2.jpeg", "Sonnenblume", "Gänseblümchen"))
    terminal.print_text("words " * 20)
    assert (len(shown.getvalue().splitlines()[-1]) <= 60) == (screen is Screen)


def test_json_has_no_nan(capsys):
    """RFC 8259 knows neither NaN nor infinity; Python's own parser is more lenient than others."""
    terminal.print_json({"loss": math.nan, "of": [math.inf, 0.5, {"name": "NaN", "count": 3}], "none": ()})

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {"loss": None, "of": [None, 0.5, {"name": "NaN", "count": 3}], "none": []}


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress(monkeypatch, is_terminal):
    """Rows that are printed meanwhile go to a file whole, and log lines stay above the bar."""
    screen, file = io.StringIO(), io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=60, color_system=None)
    monkeypatch.setattr(terminal, "console", lambda: console)
    monkeypatch.setattr(sys, "stdout", file)
    terminal.setup_logging()
    for item in terminal.track("abc", 3, "checking [x]\ny"):
        print(f"row {item}")
        logging.getLogger("imgclf_jax").warning("watch out for %s", item)
        time.sleep(0.2)
    with terminal.showing("listing a[red]\nb"):
        pass
    assert file.getvalue() == "row a\nrow b\nrow c\n"
    text = screen.getvalue()
    assert bool(re.search(r"checking \[x\]\\ny \d/3", text)) == is_terminal
    assert (r"listing a[red]\nb" in text) == is_terminal
    if is_terminal:
        assert [line for line in "abc" if f"watch out for {line}\n" in re.sub(r" *\n", "\n", text)] == list("abc")


def test_tables_and_log_lines_escape_what_is_not_printable(capsys):
    names = ["a\nb", "\x1b[31m", "\udcff", "é漢"]
    terminal.print_table(["file"], [[name] for name in names])
    out = capsys.readouterr().out
    assert [line.strip("│ ") for line in out.splitlines() if "│" in line] == [r"a\nb", r"\x1b[31m", r"\udcff", "é漢"]

    root = logging.getLogger()
    before = root.handlers[:], root.level
    terminal.setup_logging()
    log = logging.getLogger("imgclf_jax.test")
    for name in names:
        log.info("%s: %d files, %r", name, 3, [name])
    log.info("a table:\n%s", "x | y\n1 | \x1b[0m")
    root.handlers[:], root.level = before
    err = capsys.readouterr().err.splitlines()
    assert [line[9:] for line in err[:4]] == [f"{printable(name)}: 3 files, {[name]!r}" for name in names]
    assert [line[9:] for line in err[4:5]] + err[5:] == ["a table:", "x | y", r"1 | \x1b[0m"]
