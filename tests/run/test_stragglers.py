"""The process that the others wait for is named, with its time for a step."""

import re

import processes_check as check
import pytest

from imgclf_jax.run.stragglers import Reading, describe, find


def readings(steps, **own):
    """Of processes that have made so many steps, each of which took the devices 0.1 s, and a host `own` seconds.

    A process that is ahead waits for the slowest in its step.
    """
    slowest = max(own.values())
    return {i: Reading(steps, host * steps, (0.1 + slowest - host) * steps) for i, host in enumerate(own.values())}


def test_one_of_two_is_slow():
    slow = find(readings(0, a=0.02, b=0.3), readings(100, a=0.02, b=0.3))
    assert slow == {1: pytest.approx((0.4, 0.3, 0.12))}
    assert describe(slow, lambda process: f"process {process} (host b)") == [
        "process 1 (host b) takes 0.4 s for a step, 3.3 times the median of all processes: 0.3 s of it is its input "
        "and its host, while the others wait"
    ]


@pytest.mark.parametrize(
    ("own", "slow"),
    [
        ({"a": 0.02, "b": 0.03}, []),
        ({"a": 0.0, "b": 0.0, "c": 0.04, "d": 0.06}, [3]),
        ({"a": 0.3, "b": 0.3, "c": 0.3}, []),  # all wait for a slow disk
        ({"a": 0.3, "b": 0.3, "c": 0.0}, []),  # most are slow
    ],
)
def test_who_is_slow(own, slow):
    assert list(find(readings(10, **own), readings(200, **own))) == slow


def test_too_early_to_tell():
    assert find({}, readings(100, a=0.0, b=1.0)) == {}
    assert find(readings(100, a=0.0, b=1.0), readings(102, a=0.0, b=1.0)) == {}
    assert find({}, {}) == {}


SLOW = """
import threading
import time
import jax
from imgclf_jax.data.sources import FakeSource
from imgclf_jax.run import stragglers

stragglers.EVERY = 5.0

one_at_a_time = threading.Lock()  # of the batches that are read in parallel

class Slow(FakeSource):
    def read(self, ids):
        if jax.process_index():
            with one_at_a_time:
                time.sleep(0.3)
        return super().read(ids)

def splits():
    return {name: Slow(10**7, (12, 12, 1), ("a", "b"), offset) for name, offset in (("train", 0), ("test", 10**7))}
"""


@pytest.mark.thorough
def test_a_slow_source_of_one_of_two_processes(tmp_path, monkeypatch):
    (tmp_path / "slow_source.py").write_text(SLOW)
    words = ("--config.data.source=slow_source:splits()", "--config.preprocess=decode(1)", "--config.batch_size=32",
             "--config.model=mlp(widths=(16,))", "--config.total=60 steps", "--config.eval_every=",
             "--config.checkpoint_every=", "--config.tensorboard=False",
             "--config.data.eval.test=test[:16]", "--config.schedule=constant(1e-3)")  # fmt: skip
    monkeypatch.setattr(check, "PATHS", (str(tmp_path), *check.PATHS))
    check.run(tmp_path / "run", 2, 1, words)
    logs = [(tmp_path / f"run.log.{number}").read_text() for number in range(2)]
    found = re.findall(r"process (\d) \(host .*\) takes (\S+) s for a step, (\S+) times the median", logs[0])
    assert found, logs[0]
    assert {process for process, *_ in found} == {"1"}
    assert any(float(seconds) > 0.25 for _, seconds, _ in found)  # the first ones have batches read in advance
    assert "times the median" not in logs[1]
