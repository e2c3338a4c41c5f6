"""Progress of long work: on a terminal alone, and it leaves other output alone."""

import io
import logging
import re
import sys
import time

import pytest
from rich.console import Console

from imgclf_jax.core import terminal


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
