"""The notebooks run from the first cell to the last, and print what they show."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "tolerance"), [("library", 0.02), ("own_loop", 0.1)])
def test_the_cells_run_in_order(name, tolerance, capsys, tmp_path, monkeypatch):
    """The losses of its own loop depend on the processor, more so the longer it trains."""
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    for cell in json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or ("matplotlib" in source and not importlib.util.find_spec("matplotlib")):
            continue
        capsys.readouterr()
        exec(compile(source, name, "exec"), variables)
        out = capsys.readouterr().out
        for shown in cell["outputs"]:
            expected = "".join(shown["text"])
            number = r"\d+\.\d+"
            assert re.sub(number, "N", out.strip()) == re.sub(number, "N", expected.strip())
            for found, wanted in zip(re.findall(number, out), re.findall(number, expected), strict=True):
                assert abs(float(found) - float(wanted)) < tolerance
