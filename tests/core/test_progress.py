"""Progress of long work: what is said, where, and that it leaves other output alone."""

import io
import logging
import re
import sys
import time

import pytest
from rich.console import Console

from imgclf_jax.core import terminal


@pytest.mark.parametrize(("done", "total", "seconds", "said"), [
    (0, 10, 0.0, "evaluating test: 0 of 10"),
    (1280, 10_000, 2.0, "evaluating test: 1,280 of 10,000, 640 a second, 14 s left"),
    (10_050, 10_000, 20.0, "evaluating test: 10,000 of 10,000, 502 a second"),  # the last batch is padded
    (3, 12, 30.0, "evaluating test: 3 of 12, 10.0 s each, 2 min left"),
])  # fmt: skip
def test_what_is_said(done, total, seconds, said):
    assert terminal.describe_progress("evaluating test", done, total, seconds) == said


@pytest.mark.parametrize(("seconds", "said"), [
    (0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (172_800, "2.0 days")])  # fmt: skip
def test_durations(seconds, said):
    assert terminal.duration(seconds) == said


@pytest.fixture
def quick(monkeypatch):
    """A terminal, or none, on which progress is shown at once."""

    def set_up(is_terminal: bool) -> io.StringIO:
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=is_terminal, width=40, color_system=None)
        monkeypatch.setattr(terminal, "console", lambda: console)
        monkeypatch.setattr(terminal, "_LOGGED", 0.005)
        return screen

    return set_up


def slowly(items):
    for item in items:
        time.sleep(0.03)
        yield item


def on_screen(text):
    """The lines that remain on a terminal: what a carriage return and an erased line leave of the output."""
    lines, row = [""], 0
    for part in re.split(r"(\r|\n|\x1b\[[0-9;?]*[A-Za-z])", text):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif part and part[0] not in "\r\x1b":
            lines[row] = part
    return [line.rstrip() for line in lines if line.strip()]


def test_on_a_terminal(quick, monkeypatch):
    """The line fits, makes room for what is printed and logged, and is gone at the end."""
    screen = quick(True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(screen, "isatty", lambda: True)
    terminal.setup_logging()
    for item in terminal.track(slowly("abc"), 3, "checking [x]\n" + "y" * 9):
        print(f"row {item}")
        logging.getLogger("imgclf_jax").warning("watch out for %s", item)
        time.sleep(0.3)
    text = screen.getvalue()
    shown = re.findall(r"checking \[x\]\\ny*: \d of 3[^\r\n\x1b]*", text)
    assert shown
    assert max(map(len, shown)) <= 40
    rest = [re.sub(r"^\[?\d\d:\d\d:\d\d\]? |^ +", "", line) for line in on_screen(text)]
    assert rest == [line for item in "abc" for line in (f"row {item}", f"watch out for {item}")]


def test_without_a_terminal_on_standard_output_rows_go_there(quick, monkeypatch):
    quick(True)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    for item in terminal.track("ab", 2, "work"):
        print(item)
    assert file.getvalue() == "a\nb\n"


def test_elsewhere_it_is_a_line_of_the_log(quick, caplog):
    screen = quick(False)
    with caplog.at_level(logging.INFO, "imgclf_jax"):
        assert list(terminal.track(slowly("abc"), 6, "work", weight=lambda _: 2)) == ["a", "b", "c"]
    assert caplog.messages[-1].startswith("work: ")
    assert any("of 6, " in message for message in caplog.messages)
    assert screen.getvalue() == ""


def test_an_item_counts_once_the_caller_is_done_with_it(quick, caplog):
    """An evaluation of one batch said 360 of 360 while it compiled, at ever fewer images a second."""
    quick(False)
    with caplog.at_level(logging.INFO, "imgclf_jax"):
        for _ in terminal.track([1], 1, "work"):
            time.sleep(0.1)
    assert set(caplog.messages) == {"work: 0 of 1"}
