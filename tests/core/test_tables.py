"""Tables on a narrow terminal, in a file, and JSON: nothing of them is lost."""

import io
import json
import math
import sys

import pytest

from imgclf_jax.core import terminal


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
