"""Early stopping: when a run ends, as a function of what it has recorded."""

import functools
import json
import math
from fractions import Fraction

import pytest

from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.cadences import Cadences
from imgclf_jax.run.early_stopping import EarlyStopping, build, find_reason
from imgclf_jax.run.provenance import DataInfo

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(("sign", "values", "patience", "stops"), [
    (-1, [3, 2, 1, 1, 2, 1], 20, 5),  # an equal value is no improvement
    (-1, [3, 2, 1, 1, 2, 0.5], 30, None),  # just in time
    (-1, [3, 2, 1, 1, 2, 1], 30, 6),
    (1, [0.5, 0.7, 0.6, 0.8, 0.8], 10, 3),
    (-1, [3, NAN, -INF, 2], 30, None),  # what is not finite is no improvement
    (-1, [3, NAN, -INF, 2], 20, 3),
    (1, [NAN, NAN, NAN], 30, 3),  # nor ever was
    (1, [], 1, None),
])  # fmt: skip
def test_when_a_run_stops(sign, values, patience, stops):
    """Evaluations are 10 steps apart. The first reason ends the run."""
    stopping = EarlyStopping("val/x", sign, Fraction(patience), "val/x, patience …")
    history = [(10 * (i + 1), value) for i, value in enumerate(values)]
    reasons = [stopping.reason(history[:n]) for n in range(1, len(history) + 1)]
    first = next((n for n, reason in enumerate(reasons, 1) if reason), None)
    assert first == stops


def built(recipe):
    steps = functools.partial(recipe.steps, "stop", total=recipe.total)
    return build(recipe.config.stop, recipe.period("eval_every"), steps)


@pytest.mark.parametrize("examples", [64, 1437])
@pytest.mark.parametrize(("patience", "waits"), [("5 epochs", 5), ("1.3 epochs", 2), ("0.5%", 1)])
def test_a_patience_in_epochs_counts_evaluations_of_epochs(examples, patience, waits):
    """However many steps an epoch has, and whichever evaluation was the best one."""
    keys = {"stop": f"test/loss, patience {patience}", "eval_every": "1 epochs", "total": "200 epochs"}
    recipe = Recipe(config(batch_size=64, **keys), DataInfo(examples, (12, 12, 1), tuple("abcd"), ""))
    stopping = built(recipe)
    steps = Cadences(recipe.total, None, recipe.period("eval_every"), None).evaluations(recipe.total)
    for best in range(8):
        history = [(step, float(i != best)) for i, step in enumerate(steps)]
        assert next(n for n in range(1, 99) if stopping.reason(history[: best + n + 1])) == waits


def test_what_is_recorded(tmp_path):
    """A resumed run knows every evaluation, but perhaps the one that a signal cut short; else it does not go on."""
    stopping, cadences = EarlyStopping("val/loss", -1, 20, "…"), Cadences(60, None, Fraction(10), None)

    def reason(step: int, lines: list[dict]) -> str:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return find_reason(stopping, cadences, tmp_path, step)

    lines = [{"step": 10, "train/loss": 9.0}, {"step": 10, "val/loss": 3.0}, {"step": 20, "val/loss": NAN}]
    assert reason(20, lines) == reason(25, lines) == reason(30, lines) == ""
    lines.append({"step": 30, "val/loss": 3.5})
    assert reason(29, lines) == ""
    assert reason(30, lines) == "val/loss has not improved for 20 steps: best 3 at step 10"
    assert reason(60, lines) == ""  # its total
    for damaged in (lines[2:], lines[:2], [*lines[:2], {"step": 20, "val/loss": None}]):
        with pytest.raises(UserError, match=r"metrics.jsonl has no val/loss of step [12]0, by which stop="):
            reason(35, damaged)
    assert find_reason(None, cadences, tmp_path, 45) == ""


def config(**keys):
    new = configs.default_config()
    new.update(keys)
    return new


def test_the_key():
    data, keys = DataInfo(1280, (2, 2, 1), tuple("ab"), ""), {"total": "1000 steps", "eval_every": "1 steps"}
    found = built(Recipe(config(stop=" max:test/my_score ,patience   10% ", **keys), data))
    assert (found.metric, found.sign, found.patience) == ("test/my_score", 1.0, 100)
    assert built(Recipe(config(), data)) is None


def test_what_is_due():
    """Everything after the last step; a period of a half has an event at each whole number of steps."""
    cadences = Cadences(10, Fraction(4), Fraction(5, 2), None, end=7, check=Fraction(3))
    due = {step: cadences.due(step) for step in range(1, 11)}
    assert [step for step in due if due[step].log] == [4, 8, 10]
    assert [step for step in due if due[step].eval] == [3, 5, 8, 10] == cadences.evaluations(10)
    assert [step for step in due if due[step].checkpoint] == [10]
    assert [step for step in range(10) if cadences.checks(step)] == [2, 5, 8]
    assert cadences.last == 7
