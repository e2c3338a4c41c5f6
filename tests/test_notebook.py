"""The notebook runs from its first cell to its last, and prints what it shows."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "library.ipynb"


@pytest.mark.thorough
def test_the_cells_run_in_order(capsys):
    """The losses of its own loop, which depend on the processor, to two digits."""
    variables: dict = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        capsys.readouterr()
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), variables)
        out = capsys.readouterr().out
        for shown in cell["outputs"]:
            expected = "".join(shown["text"])
            number = r"\d+\.\d+"
            assert re.sub(number, "N", out.strip()) == re.sub(number, "N", expected.strip())
            for found, wanted in zip(re.findall(number, out), re.findall(number, expected), strict=True):
                assert abs(float(found) - float(wanted)) < 0.02
