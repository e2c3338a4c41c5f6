"""Files of predictions, read back by other programs' readers."""

import csv
import json

import numpy as np
import pytest
from scored import predictions

from imgclf_jax.scores.multilabel import TargetPredictions
from imgclf_jax.tools.evaluate import listing

CLASSES = ("cat, tame", 'dog "big"', "é漢")
LABELS = np.array([2, 0])
PROBABILITIES = np.array([[0.25, 0.25, 0.5], [0.125, 0.75, 0.125]], np.float32)


@pytest.fixture
def table():
    return list(listing.rows("test", ["a b.png", "1"], predictions(LABELS, PROBABILITIES), CLASSES, 2, 7))


EXPECTED = [
    {"set": "test", "example": "a b.png", "label": "é漢", "correct": True, "class_1": "é漢", "probability_1": 0.5,
     "class_2": "cat, tame", "probability_2": 0.25, "step": 7},
    {"set": "test", "example": "1", "label": "cat, tame", "correct": False, "class_1": 'dog "big"',
     "probability_1": 0.75, "class_2": "cat, tame", "probability_2": 0.125, "step": 7},
]  # fmt: skip


def read(file):
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_that_are_no_utf_8(tmp_path, kind):
    """Their bytes are escaped as in the files of `features`; the evaluation was lost by a traceback."""
    file, name = tmp_path / f"predictions.{kind}", b"\xff".decode("utf-8", "surrogateescape")
    made = predictions(LABELS, PROBABILITIES)
    listing.write(file, list(listing.rows("test", [f"{name}.png", "a"], made, (*"ab", name), 1)))
    first, second = read(file)
    assert [first[key] for key in ("example", "label", "class_1")] == [r"\udcff.png", r"\udcff", r"\udcff"]
    assert second["example"] == "a"
    listing.write(file, list(listing.target_rows("test", ["a"], TargetPredictions(*np.ones((3, 1, 1))), [name])))
    assert r"target[\udcff]" in read(file)[0]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_what_is_written_is_read_back(tmp_path, table, kind):
    file = tmp_path / f"predictions.{kind}"
    listing.write(file, table)
    if kind == "csv":
        with file.open(newline="", encoding="utf-8") as stream:
            assert list(csv.DictReader(stream)) == [{k: str(v) for k, v in row.items()} for row in EXPECTED]
    else:
        assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == EXPECTED
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_a_model_that_predicts_nan_is_written_as_json(tmp_path):
    """JSON has no NaN, which strict readers refuse: it is null, as in --format=json."""
    file = tmp_path / "predictions.jsonl"
    listing.write(file, list(listing.rows("test", ["a"], predictions(LABELS[:1], np.full((1, 3), np.nan)), CLASSES, 1)))
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["probability_1"] is None
