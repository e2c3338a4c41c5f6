"""`launch.py find-lr`: its losses are those of training at the same rates, and it suggests the steepest slope."""

import json
import math

import numpy as np
import pytest

import launch
from imgclf_jax.core.errors import UserError
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.tools.find_lr.command import RangeTest, _with_rate, suggest

pytestmark = pytest.mark.usefixtures("one_device")

KEYS = ("--config.data.source=fake(64, (6, 6, 1), 3)", "--config.preprocess=decode(1)", "--config.batch_size=16",
        "--config.augment=normalize", "--config.model=mlp(widths=(8,))")  # fmt: skip


@pytest.mark.thorough
def test_its_losses_are_those_of_training_with_these_rates(tmp_path, capsys):
    words = ["--steps=12", "--low=1e-4", "--high=1e-1", "--format=json", f"--html={tmp_path}/lr.html"]
    assert launch.main(["find-lr", *KEYS, *words]) == 0
    assert "log10 of the learning rate" in (tmp_path / "lr.html").read_text()
    found = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(found["learning_rates"], np.geomspace(1e-4, 1e-1, 12), rtol=1e-12)
    schedule = "imgclf_jax.tools.find_lr.command:ramp(1e-4, 1e-1)"
    train = ["train", *KEYS, f"--workdir={tmp_path}", "--config.total=12 steps", f"--config.schedule={schedule}",
             "--config.log_every=1 steps", "--config.eval_every=", "--config.tensorboard=False"]  # fmt: skip
    assert launch.main(train) == 0
    logged = {r["step"]: r for r in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r}
    assert [logged[step]["train/loss"] for step in range(1, 13)] == found["losses"]
    weights = 0.95 ** -np.arange(12.0)  # of an exponential moving average, whose bias is corrected
    average = np.cumsum(weights * found["losses"]) / np.cumsum(weights)
    np.testing.assert_allclose(found["smoothed"], average, rtol=1e-12)
    rates = [logged[step]["train/learning_rate"] for step in range(1, 13)]
    np.testing.assert_allclose(rates, found["learning_rates"], rtol=1e-5)


def test_the_suggestion_is_where_the_loss_falls_fastest():
    """A logistic curve in log10 of the learning rate, centered at 10**-3, and a rise beyond 10**-1."""
    x = np.linspace(-7, 0, 2000)  # so fine that smoothing hardly shifts the curve
    losses = 2.3 - 2 / (1 + np.exp(-4 * (x + 3))) + np.where(x > -1, (x + 1) ** 2 * 10, 0)
    steepest, lowest = suggest(RangeTest(10.0**x, losses, losses))
    assert math.log10(steepest) == pytest.approx(-3, abs=0.1)
    assert math.log10(lowest) == pytest.approx(-1, abs=0.3)
    with pytest.raises(UserError, match="the loss never falls"):
        suggest(RangeTest(10.0**x, np.exp(x), np.exp(x)))


@pytest.mark.parametrize(("schedule", "expected"), [
    ("cosine(1e-3, warmup='5%')", "cosine(0.021, warmup='5%')"), ("constant(peak=1)", "constant(peak=0.021)"),
    ("my_schedules:own(1)", ""),
])  # fmt: skip
def test_the_schedule_keeps_its_other_arguments(schedule, expected):
    assert _with_rate(schedule, 0.0213) == expected


def test_a_loss_that_diverges_at_once_gets_a_sentence(capsys):
    flags = ["--low=1e20", "--high=1e30", "--config.optimizer=sgd", "--steps=40"]
    assert launch.main(["find-lr", *KEYS, *flags]) == 1
    assert "the loss diverges after" in capsys.readouterr().err
