"""The verdict of `stress.py --memory` on known readings: a leak is distinguished from occasional growth."""

import numpy as np
import pytest
from stress_memory import growth, judge

SECONDS = np.arange(0.0, 3600.0, 45.0)  # 80 readings


def readings(leak: float = 0.0, blocks: float = 0.0, jumps: tuple[float, ...] = ()) -> np.ndarray:
    """[80, 4]: seconds, saves, MB in use, Python's blocks, with this much leaked in an hour, and noise."""
    rng = np.random.default_rng(0)
    used = 192 + leak * SECONDS / 3600 + rng.normal(0, 0.003, SECONDS.size)
    for place, jump in zip(np.linspace(20, 78, len(jumps)).astype(int), jumps, strict=True):
        used[place:] += jump
    return np.stack([SECONDS, SECONDS // 3, used, 2e6 + blocks * SECONDS / 3600 + rng.normal(0, 30, 80)], 1)


@pytest.mark.parametrize("leak", [0.0, 2.0, 15.0])
def test_growth_is_that_of_the_leak(leak):
    rows = readings(leak, jumps=(3.7, 7.7, 3.7))
    jumps, steady, error = growth(rows[:, 0] / 3600, rows[:, 2])
    assert sorted(round(jump) for jump in jumps) == [4, 4, 8]
    assert error < 0.2
    assert abs(steady - leak) < 3 * error


@pytest.mark.parametrize(
    ("lost", "found"),
    [({}, 0), ({"jumps": (3.7, 7.7)}, 0), ({"leak": 4.0}, 1), ({"blocks": 2e6}, 1), ({"jumps": (3.7,) * 30}, 1)],
)
def test_a_leak_is_found_and_jumps_are_told(lost, found, capsys):
    assert judge(readings(**lost), start=600) == found
    assert f"{len(lost.get('jumps', ()))} jumps of over" in capsys.readouterr().out
