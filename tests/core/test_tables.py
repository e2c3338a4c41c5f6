"""Tables on a terminal of 80 columns, in a file, and JSON: nothing of them is lost."""

import io
import json
import math
import re
import sys

import pytest

from imgclf_jax.core import terminal

ROWS = [["photographs/2026-11-27/a-rather-long-name-of-a-file.png", "Katze 0.8055", "Hund 0.1915", "Maus <0.0001",
         "gradcam", "explained/a-rather-long-name-of-a-file.gradcam.png"]]  # fmt: skip
COLUMNS = ["file", "top 1", "top 2", "top 3", "method", "picture"]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def printed(monkeypatch, columns, rows, width):
    shown = Terminal() if width else io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("COLUMNS", str(width or 80))
    terminal.print_table(columns, iter(rows))
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())


def cells(text, count):
    """What each column says, its lines put together."""
    lines = [re.split("[┃│]", line)[1:-1] for line in text.splitlines() if line[:1] in "┃│"]
    assert {len(line) for line in lines} == {count}
    return ["".join(cell.strip() for cell in column) for column in zip(*lines, strict=True)]


@pytest.mark.parametrize("width", [80, 60, 40])
def test_a_table_loses_nothing_on_a_narrow_terminal(monkeypatch, width):
    text = printed(monkeypatch, COLUMNS, ROWS, width)
    assert max(map(len, text.splitlines())) == width
    found = cells(text, len(COLUMNS))
    assert [cell.replace(" ", "") for cell in found] == [
        (name + cell).replace(" ", "") for name, cell in zip(COLUMNS, ROWS[0], strict=True)
    ]


def test_a_table_that_fits_is_as_wide_as_its_cells(monkeypatch):
    lines = printed(monkeypatch, COLUMNS, ROWS, 200).splitlines()
    assert len(lines) == 5
    assert printed(monkeypatch, COLUMNS, ROWS, None).splitlines() == lines


def test_a_row_is_a_line_in_a_file_whatever_its_length(monkeypatch):
    name = "x" * 3000
    lines = printed(monkeypatch, ["file", "top 1"], [[name, "a 0.5000"]], None).splitlines()
    assert f"│ {name} │ a 0.5000 │" in lines


def test_json_has_no_nan(capsys):
    """RFC 8259 knows neither NaN nor infinity; Python's own parser is more lenient than others."""
    terminal.print_json({"loss": math.nan, "of": [math.inf, 0.5, {"name": "NaN", "count": 3}], "none": ()})

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {"loss": None, "of": [None, 0.5, {"name": "NaN", "count": 3}], "none": []}
