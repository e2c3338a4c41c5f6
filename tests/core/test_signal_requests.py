"""The meaning of repeated signals; tests/test_signals.py sends real signals to whole runs."""

import concurrent.futures
import os
import signal
import time

import pytest

from imgclf_jax.core import signals


@pytest.fixture(autouse=True)
def _obeyed():
    """Resets ignored signals, since some shells start background processes with SIGINT ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in signals.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ended(monkeypatch) -> list[tuple[int, str]]:
    """The ends of the process as (number, line), with a clock that stands still."""
    calls: list[tuple[int, str]] = []

    def end(number, line):
        calls.append((number, line))
        raise SystemExit

    monkeypatch.setattr(signals, "_end", end)
    return calls


def test_signals_close_together_are_one_request(ended, monkeypatch, caplog):
    """`uv run` repeats a Ctrl-C that the process also received from the terminal. A third request is obeyed."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    requests = signals._Requests(lambda: "the steps since the checkpoint of step 40")
    for _ in range(3):
        requests.receive(signal.SIGINT)
        now[0] += 0.5
    assert (requests.first, len(caplog.records), ended) == ("SIGINT", 1, [])
    now[0] += signals.SAME
    for _ in range(2):
        requests.receive(signal.SIGTERM)
    assert requests.first == "SIGINT"
    assert [r.message for r in caplog.records[1:]] == [
        "SIGTERM again: a checkpoint is being saved; a third signal ends the process at once and loses the steps since "
        "the checkpoint of step 40"
    ]
    now[0] += signals.SAME
    with pytest.raises(SystemExit):
        requests.receive(signal.SIGTERM)
    assert ended == [(15, "SIGTERM again: stopped at once; lost: the steps since the checkpoint of step 40")]


def test_a_signal_in_an_attempt_that_goes_back_is_obeyed_after_it(ended, monkeypatch):
    """The run rolls back at the step that the signal came in: its files are whole, and it ends."""
    monkeypatch.setattr(signals, "_now", signals._Requests())
    signals.obey_noted()
    with signals.noted(lambda: "nothing"):
        signals._now.receive(signal.SIGTERM)
    assert not ended
    with pytest.raises(SystemExit):
        signals.obey_noted()
    assert ended == [(15, "SIGTERM: stopped; run the same command again")]


def test_without_anything_to_save_it_ends(ended):
    with pytest.raises(SystemExit):
        signals._Requests().receive(signal.SIGTERM)
    assert ended == [(15, "SIGTERM: stopped; run the same command again")]


def test_the_second_signal_may_come_when_all_is_saved(ended):
    """It changes nothing: the exit status stays that of a run that saved a checkpoint."""
    with signals.noted(str):
        signals._now.receive(signal.SIGINT)
    signals._now.receive(signal.SIGINT)
    assert ended == []
    signals._now.began -= signals.SAME
    with pytest.raises(SystemExit):
        signals._now.receive(signal.SIGINT)
    signals._now.began = -signals.SAME


def test_handlers_are_there_inside_alone():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.noted(str) as stop:
        assert stop() == ""
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop() == "SIGHUP"
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    with signals.noted(str) as stop:
        assert stop() == ""


def test_a_signal_that_was_ignored_stays_ignored():
    """As under `nohup`, whose processes outlive their terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.noted(str) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop() == ""
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_event_loop_may_take_the_wakeup_away(ended):
    """Python's own handler then passes the signal on."""
    with signals.noted(str) as stop:
        signal.set_wakeup_fd(-1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == "SIGTERM"


def test_waiting_ends_with_a_signal():
    future: concurrent.futures.Future[int] = concurrent.futures.Future()
    with pytest.raises(signals.Stopped, match="SIGTERM"):
        signals.wait_for(future, lambda: "SIGTERM")
    future.set_result(3)
    assert signals.wait_for(future, lambda: "SIGTERM") == 3
