"""What is due after a step."""

from fractions import Fraction

from imgclf_jax.run.cadences import Cadences


def test_what_is_due():
    """Everything after the last step; a period of a half has an event at each whole number of steps."""
    cadences = Cadences(10, Fraction(4), Fraction(5, 2), None, end=7, check=Fraction(3))
    due = {step: cadences.due(step) for step in range(1, 11)}
    assert [step for step in due if due[step].log] == [4, 8, 10]
    assert [step for step in due if due[step].eval] == [3, 5, 8, 10] == cadences.evaluations(10)
    assert [step for step in due if due[step].checkpoint] == [10]
    assert [step for step in range(10) if cadences.checks(step)] == [2, 5, 8]
    assert cadences.last == 7
