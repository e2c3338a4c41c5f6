"""Where processes stop, played by threads over a store that behaves like JAX's coordination service."""

import contextlib
import copy
import re
import threading
import time
import types
from concurrent.futures import Future

import pytest

from imgclf_jax.config import default_config
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.signals import Stopped
from imgclf_jax.core.stopping import Stopping, stopping
from imgclf_jax.data import sources
from imgclf_jax.run import workdir
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir

HERE = threading.local()


class Store:
    """The key-value store of a run, in which one process waits for the keys of another."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise RuntimeError(f"ALREADY_EXISTS: {key}")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]

    def key_value_dir_get(self, folder):
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(folder + "/")]


@pytest.fixture
def three(monkeypatch):
    """Three processes as threads; yields a function that runs a function in all of them and returns their results."""
    store, numbers = Store(), {number: iter(range(100)) for number in range(3)}
    monkeypatch.setattr(processes, "_count", 3)
    monkeypatch.setattr(processes, "_client", lambda: store)
    monkeypatch.setattr(processes, "_hosts", ["host a", "host b", "host b"])
    monkeypatch.setattr(processes, "index", lambda: HERE.number)
    monkeypatch.setattr(processes, "_number", lambda: next(numbers[HERE.number]))

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

    run.store = store
    return run


def test_process_0_decides_for_all(three):
    asked = []

    def decide():
        asked.append(HERE.number)
        return {"steps": [1, 2]}

    assert three(lambda _: processes.broadcast_from_process_0("this", decide)) == {
        key: {"steps": [1, 2]} for key in range(3)
    }
    assert asked == [0]


def test_values_are_gathered_by_the_number_of_the_process(three):
    assert three(lambda number: processes.gather("it", number * 10)) == {key: [0, 10, 20] for key in range(3)}


def test_who_is_missing_is_named(three):
    results = three(lambda _: processes.barrier("saving", 0.2), numbers=(0, 2))
    for number in (0, 2):
        assert isinstance(results[number], UserError)
        assert "process 1 (host b) has not reached the same point (saving) within 0.2 s" in str(results[number])


def test_data_are_prepared_once_a_host(three):
    """First by process 0, then by the first process of the other host; the rest only look at them."""
    began, lock = [], threading.Lock()

    def prepare():
        with lock:
            began.append(HERE.number)
        time.sleep(0.05)
        return sorted(began)

    results = three(lambda _: processes.once_a_host("data", prepare))
    assert began == [0, 1, 2]
    assert results == {0: [0], 1: [0, 1], 2: [0, 1, 2]}


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("signalled", [[0], [2], [1, 2]])
def test_all_stop_after_the_same_number_of_points(three, signalled, late):
    """However far each has come when the signal arrives, and whichever receives it."""
    stops = {}
    created = threading.Barrier(3)

    def loop(number):
        asked = {"name": ""}
        stop = stops[number] = Stopping(lambda: asked["name"], wait=10)
        created.wait()
        for passed in range(1000):
            if number in signalled and passed == 20:
                asked["name"] = "SIGTERM"
            time.sleep(0.003 if number == late else 0.001)
            if number not in signalled and three.store.key_value_dir_get("imgclf_jax/event") and passed % 3 == 0:
                stop.hear("SIGTERM", signalled[0])
            if name := stop():
                assert stop() == name, "once stopped, it stays so"
                return name, passed
        return "", passed

    results = three(loop)
    assert set(results.values()) == {("SIGTERM", results[0][1])}
    assert results[0][1] >= 20


def test_one_that_waits_stops_only_if_no_other_is_farther(three):
    """A process that still compiles must join whatever the others have begun."""
    stops = {}
    created = threading.Barrier(3)

    def play(number):
        stop = stops[number] = Stopping(lambda: "SIGTERM" if number == 0 else "", wait=10)
        if number == 1:
            assert stop() == ""  # it has passed one point
        created.wait()
        if number:
            stop.hear("SIGTERM", 0)
            return stop() if number == 1 else [stop.waiting(), stop(), stop()]
        return [stop.waiting(), stop(), stop()]

    results = three(play)
    assert results == {0: ["", "", "SIGTERM"], 1: "SIGTERM", 2: ["", "", "SIGTERM"]}


@pytest.mark.parametrize("signalled", [None, 1, 2])
def test_none_begins_before_all_are_ready(three, signalled):
    """If one receives a signal before that, all stop, including those that wait."""
    begun, ready = [], []
    created = threading.Barrier(3)

    def play(number):
        stop = Stopping(lambda: "SIGTERM" if number == signalled else "", wait=10)
        created.wait()
        time.sleep(0.1 * number)
        if signalled is not None and number != signalled:
            threading.Timer(0.3, hear, (number, stop, signalled)).start()
        if number == 2 and signalled is not None:
            while not (name := stop.waiting()):
                time.sleep(0.01)
            return name
        ready.append(number)
        try:
            stop.wait_for_all("compiled")
        except Stopped as e:
            return str(e)
        begun.append(len(ready))
        return stop()

    expected = "" if signalled is None else "SIGTERM"
    assert three(play) == dict.fromkeys(range(3), expected)
    assert begun == ([3, 3, 3] if signalled is None else [])


def test_attempts_in_one_process_wait_anew(three):
    """After a rollback all processes compile and stop again, with another `Stopping`."""

    def play(number):
        for attempt in range(3):
            stop = Stopping(lambda: "", wait=10, number=attempt)
            stop.wait_for_all("compiled")
        stop.hear("SIGTERM", 0)
        return stop()

    assert three(play) == dict.fromkeys(range(3), "SIGTERM")


def hear(number, stop, signalled):
    """Delivers the signal in the thread that listens to the other processes."""
    HERE.number = number
    stop.hear("SIGTERM", signalled)


def test_what_differs_is_named_with_its_process(three):
    """The same error in all processes; only the first names of a long list."""
    facts = [{"seed": 1, "model": "cnn", "total": "2 epochs"}] * 2 + [{"seed": 2, "model": "cnn", "new": None}]
    told = three(lambda number: processes.agree("comparing", lambda: facts[number]))
    assert {str(error) for error in told.values()} == {
        "process 2 (host b) has seed=2, total=None, process 0 (host a) has seed=1, total=2 epochs; " + processes.ALIKE
    }
    one = [{"seed": 1}, {"seed": 1}, {"other": 2}]
    assert three(lambda number: processes.agree("again", lambda: one[number], in_both=True)) == dict.fromkeys(range(3))
    assert three(lambda number: processes.agree("again", lambda: {"x": (1, 2.5)})) == dict.fromkeys(range(3))


def test_data_that_differ_are_named(three):
    """For example, a folder with the same path has other files on another host."""

    def open_data(number):
        config = default_config()
        config.data.source = f"fake({64 + number // 2})"
        return len(sources.open_data(config)["train"])

    told = {str(error) for error in three(open_data).values()}
    assert len(told) == 1
    assert re.match(
        r"process 2 \(host b\) has the data of split train=\w+, .* all processes must read the same data", *told
    )


def test_work_directories_that_differ_are_told(three, tmp_path, monkeypatch):
    """They compare the file that process 0 writes, since one path may be on two disks."""
    monkeypatch.setattr(workdir, "_SEEN", 0.2)
    place = Workdir(tmp_path / "a")
    with place.held():
        assert three(lambda _: place.check_shared()) == dict.fromkeys(range(3))
        told = three(lambda number: (place if number < 2 else Workdir(tmp_path / "b")).check_shared())
    expected = f"process 2 does not see the files of process 0 in the work directory: {str(tmp_path)[:9]}"
    assert {str(error)[: len(expected)] for error in told.values()} == {expected}


@pytest.fixture
def checkpoints(tmp_path):
    """Checkpoints of step 3 alone, without Orbax."""
    checkpoints = Checkpoints.__new__(Checkpoints)
    checkpoints.directory, checkpoints._read_only, checkpoints._saving = tmp_path, False, None
    checkpoints._manager = types.SimpleNamespace(all_steps=lambda: [3])
    checkpoints._find_error = lambda *_: "checkpoint 3 is damaged"
    return checkpoints


def test_all_wait_until_process_0_has_verified_a_checkpoint(three, checkpoints):
    """Before the next save, in which Orbax would wait for process 0 for five minutes only. A poll waits for nobody."""
    verified, written = Future(), Future()
    written.set_result(None)

    def verify():  # ends once the last process waits for it
        with contextlib.suppress(RuntimeError):
            three.store.blocking_key_value_get("imgclf_jax/call/0/2", 2000)
        verified.set_result(None)

    def save(number):
        own = copy.copy(checkpoints)
        own._saving = written if number else verified
        own.poll()
        if not number:
            threading.Thread(target=verify).start()
        own.save(3, {})
        return verified.done()

    assert three(save) == dict.fromkeys(range(3), True)


@pytest.mark.parametrize("reading", [True, False])
def test_verifying_a_checkpoint_may_take_hours(three, checkpoints, monkeypatch, reading):
    """The processes wait for process 0 when they restore it, and at the end of training."""
    get, hour = three.store.blocking_key_value_get, 3_600_000

    def get_late(key, milliseconds):
        if key.endswith("/0") and milliseconds < hour:
            raise RuntimeError("DEADLINE_EXCEEDED")
        return get(key, milliseconds)

    def end(_):
        with stopping(str):
            pass

    monkeypatch.setattr(three.store, "blocking_key_value_get", get_late)
    told = three((lambda _: checkpoints.restore(3, {})) if reading else end)
    assert {str(error) for error in told.values()} == {"checkpoint 3 is damaged" if reading else "None"}


def test_a_process_that_is_missing_makes_no_checkpoint_damaged(three, checkpoints):
    """No older one is restored then, and nobody is told to remove them."""
    checkpoints.restore = lambda *_: processes.barrier("verifying", 0.1)
    three.store.key_value_set("imgclf_jax/call/0/0", '["looking for checkpoints", [[1, 3], [1, 3]]]')
    told = three(lambda _: checkpoints.restore_latest({}), numbers=(1, 2))
    missing = "process 0 (host a) has not reached the same point (verifying) within 0.1 s"
    assert {str(error).partition(";")[0] for error in told.values()} == {missing}


def test_who_does_something_else_is_named(three):
    """For example, one process found another list of images and finishes before the others."""
    told = three(lambda number: processes.gather("images" if number else "end", number, 1.0))
    assert "process 1 (host b) is at another point (images) than process 0 (host a) (end)" in str(told[0])
    assert "process 0 (host a) is at another point (end) than process 2 (host b) (images)" in str(told[2])


def test_one_process_alone_asks_nobody():
    names = iter(["", "SIGINT"])
    stop = Stopping(lambda: next(names))
    assert [stop(), stop.waiting()] == ["", "SIGINT"]
    assert processes.broadcast_from_process_0("x", lambda: (1, 2)) == (1, 2)
    assert processes.gather("x", 3) == [3]
    assert processes.once_a_host("x", lambda: 4) == 4
    processes.agree("x", lambda: 1 / 0)
