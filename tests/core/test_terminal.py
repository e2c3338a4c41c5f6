"""Tables and JSON lose nothing; progress of long work is shown on a terminal alone; names cannot control it."""

import io
import json
import logging
import math
import re
import sys
import time

import pytest
from rich.console import Console

from imgclf_jax.core import terminal
from imgclf_jax.core.text import printable


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
