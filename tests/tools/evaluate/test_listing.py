"""Files of predictions, read back by other programs' readers."""

import csv
import json

import numpy as np
import pytest
from scored import predictions

from imgclf_jax.tools.evaluate import listing

CLASSES = ("cat, tame", 'dog "big"', "é\udcff")  # a folder's name may hold any bytes
EXPECTED = [
    {"set": "test", "example": "a b.png", "label": r"é\udcff", "correct": True, "class_1": r"é\udcff",
     "probability_1": 0.5, "class_2": "cat, tame", "probability_2": 0.25, "step": 7},
    {"set": "test", "example": "1", "label": "cat, tame", "correct": False, "class_1": 'dog "big"',
     "probability_1": 0.75, "class_2": "cat, tame", "probability_2": 0.125, "step": 7},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_what_is_written_is_read_back(tmp_path, kind):
    file = tmp_path / f"predictions.{kind}"
    probabilities = np.array([[0.25, 0.25, 0.5], [0.125, 0.75, 0.125]], np.float32)
    made = predictions(np.array([2, 0]), probabilities)
    listing.write(file, list(listing.rows("test", ["a b.png", "1"], made, CLASSES, 2, 7)))
    if kind == "csv":
        with file.open(newline="", encoding="utf-8") as stream:
            assert list(csv.DictReader(stream)) == [{k: str(v) for k, v in row.items()} for row in EXPECTED]
    else:
        assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == EXPECTED


def test_a_model_that_predicts_nan_is_written_as_json(tmp_path):
    """JSON has no NaN, which strict readers refuse: it is null, as in --format=json."""
    file, made = tmp_path / "predictions.jsonl", predictions(np.array([2]), np.full((1, 3), np.nan))
    listing.write(file, list(listing.rows("test", ["a"], made, CLASSES, 1)))
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["probability_1"] is None
