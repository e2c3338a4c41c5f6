"""What processes exchange, played by threads over a store that behaves like JAX's coordination service."""

import re
import threading
import time
import types

import pytest

from imgclf_jax import datasets
from imgclf_jax.config import default_config
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError

HERE = threading.local()


class Store:
    """The key-value store of a run, in which one process waits for the keys of another."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1e5):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]


class Calls:
    """Numbers the calls of each process."""

    def __init__(self):
        self.numbers = {number: iter(range(100)) for number in range(3)}

    def __next__(self):
        return next(self.numbers[HERE.number])


@pytest.fixture
def three(monkeypatch):
    """Three processes as threads; yields a function that runs a function in all of them and returns their results."""
    store = Store()
    monkeypatch.setattr(processes, "_count", 3)
    monkeypatch.setattr(processes.internals, "coordination_state", lambda: types.SimpleNamespace(client=store))
    monkeypatch.setattr(processes, "index", lambda: HERE.number)
    monkeypatch.setattr(processes, "_calls", Calls())

    def run(function, numbers=range(3)):
        results = {}

        def play(number):
            HERE.number = number
            try:
                results[number] = function(number)
            except Exception as e:
                results[number] = e

        threads = [threading.Thread(target=play, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


@pytest.mark.parametrize("error", [UserError("the disk is full"), OSError("the disk is full")])
def test_an_error_of_process_0_ends_all(three, error):
    def fail():
        raise error

    told = three(lambda _: processes.broadcast(fail))
    assert {str(one) for one in told.values()} == {"the disk is full"}
    assert told[0] is error
    assert isinstance(told[1], UserError)


def test_process_0_decides_for_all(three):
    """Its value may take longer than a poll."""
    said = three(lambda number: processes.broadcast(lambda: time.sleep(0.05) or {"steps": [HERE.number]}))
    assert said == {number: {"steps": [0]} for number in range(3)}


def test_what_differs_is_named_with_its_process(three):
    """The same error in all processes; only the first names of a long list."""
    facts = [{"seed": 1, "model": "cnn", "total": "2 epochs"}] * 2 + [{"seed": 2, "model": "cnn", "total": None}]
    told = three(lambda number: processes.agree(lambda: facts[number]))
    assert {str(error) for error in told.values()} == {
        "process 2 has seed=2, total=None, process 0 has seed=1, total=2 epochs; " + processes.ALIKE
    }
    one = [{"seed": 1}, {"seed": 1}, {"other": 2}]
    assert three(lambda number: processes.agree(lambda: one[number])) == dict.fromkeys(range(3))


def test_process_0_goes_first(three):
    order = []
    three(lambda number: processes.first_in_process_0(lambda: time.sleep(0.1 * (not number)) or order.append(number)))
    assert (order[0], len(order)) == (0, 3)


def test_data_that_differ_are_named(three):
    def open_data(number):
        config = default_config()
        config.data.source = f"fake(64, (8, 8, {1 + number // 2}))"  # as many
        return datasets.open_data(config)["train"].size

    told = {str(error) for error in three(open_data).values()}
    assert len(told) == 1
    assert re.match(r"process 2 has the data of split train=\w+, .* all processes must read the same data", *told)
