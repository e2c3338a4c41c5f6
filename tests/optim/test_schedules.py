"""Schedules against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import rounding

from imgclf_jax import config
from imgclf_jax.optim import schedules
from imgclf_jax.optim.optimizers import promoting

TOTAL = 100  # steps, of 10 examples each; an epoch is 20 steps
N = np.arange(TOTAL + 5)  # and a few steps after the last


def steps(text):
    return config.steps(text, "schedule", 200, 10, TOTAL)


def half_cosine(first, last, t):
    """From `first` at t = 0 to `last` at t = 1 and after."""
    return last + (first - last) * 0.5 * (1 + np.cos(np.pi * np.clip(t, 0, 1)))


def line(first, last, t):
    return first + (last - first) * np.clip(t, 0, 1)


DEFINITIONS = {  # spec → (steps of linear warmup, the rate at each step after it)
    "constant(0.3)": (0, np.full(105, 0.3)),
    "constant(0.3, warmup='10%')": (10, np.full(105, 0.3)),
    "constant(0.3, warmup='1 steps')": (1, np.full(105, 0.3)),
    "constant(0.3, warmup='100%')": (100, np.full(105, 0.3)),
    "cosine(0.3)": (0, half_cosine(0.3, 0, N / 100)),
    "cosine(0.3, warmup='1 epochs', end=0.03)": (20, half_cosine(0.3, 0.03, (N - 20) / 80)),
    "cosine(0, warmup='10 steps')": (10, np.zeros(105)),
    "linear(0.3)": (0, line(0.3, 0, N / 100)),
    "linear(0.3, warmup='100 examples', end=0.1)": (10, line(0.3, 0.1, (N - 10) / 90)),
    "one_cycle(0.3)": (0, np.where(N < 30, half_cosine(0.012, 0.3, N / 30), half_cosine(0.3, 3e-5, (N - 30) / 70))),
    "one_cycle(0.3, warmup='50%', start=0, end=0.1)": (
        0,
        np.where(N < 50, half_cosine(0, 0.3, N / 50), half_cosine(0.3, 0.03, (N - 50) / 50)),
    ),
    "triangle(0.3, warmup='25%', start=0.2, end=0.07)": (
        0,
        np.where(N < 25, 0.3 * (0.2 + 0.8 * N / 25), 0.3 * (1 - 0.93 * np.minimum(1, (N - 25) / 75))),
    ),
    "triangle(0.3, warmup='')": (0, 0.3 * np.maximum(0, 1 - N / 100)),
    "one_cycle(0.3, warmup='', end=0)": (0, half_cosine(0.3, 0, N / 100)),
    "step(0.3)": (0, np.select([N < 50, N < 75], [0.3, 0.03], 0.003)),
    "step(0.3, at=('1 epochs', '90 steps'), factor=0.5, warmup='5%')": (
        5,
        np.select([N < 20, N < 90], [0.3, 0.15], 0.075),
    ),
    "step(0.3, at=('50%', '50 steps'), factor=0.5)": (0, np.where(N < 50, 0.3, 0.075)),  # twice at one step
}


@pytest.mark.parametrize("text", DEFINITIONS)
def test_a_schedule_is_its_definition_at_every_step(text):
    """Warmup is (n + 1) / warmup of the peak, which the first step after it has too; the last value persists."""
    warmup, expected = DEFINITIONS[text]
    expected = np.where(warmup > N, expected[warmup] * (N + 1) / max(1, warmup), expected)
    out = jax.jit(jax.vmap(promoting(schedules.build(text, steps, TOTAL))))(jnp.asarray(N))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=0.3 * rounding(20))  # of terms up to the peak, 0.3
