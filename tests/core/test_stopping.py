"""What a signal does inside and outside of `stopping`; tests/test_signals.py sends signals to whole runs."""

import os
import signal
import subprocess
import sys

import pytest

from imgclf_jax.core import stopping


@pytest.fixture(autouse=True)
def _default_handlers(monkeypatch):
    """Resets ignored signals, since some shells start background processes with SIGINT ignored."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which an ending process replaces
    before = {number: signal.signal(number, signal.SIG_DFL) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_is_noted_inside_and_the_handlers_come_back(number, caplog):
    before = [signal.getsignal(one) for one in stopping.SIGNALS]
    with stopping.stopping() as stop:
        assert stop() == ""
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
        assert [stop(), stop()] == [number.name] * 2
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == before
    assert caplog.messages == [f"{number.name}: stopping after this step, and saving a checkpoint"]


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_outside_it_ends_the_process_at_once(number, capfd):
    """With one line. A repeated signal, as `uv run` sends, does not interrupt the clean-up."""
    stopping.end_on_signals()

    def receive():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as raised:
        receive()
    assert raised.value.code == 128 + number
    assert capfd.readouterr().err == f"{number.name}: stopped; nothing is lost; run the same command again\n"


@pytest.mark.parametrize("where", ["gc.callbacks.append(ask); gc.collect()",
                                   "sys.meta_path.insert(0, Module); import anything"])  # fmt: skip
def test_it_ends_the_process_also_where_exceptions_are_dropped(where):
    """JAX has a callback of the garbage collector; a module in C++ that is interrupted aborts."""
    program = f"""if True:
        import contextlib, gc, os, signal, sys, time
        from imgclf_jax.core import stopping
        def ask(*_):
            os.kill(os.getpid(), signal.SIGTERM)
        class Module:
            def find_spec(*_):
                with contextlib.suppress(BaseException):
                    ask()
                time.sleep(60)
        stopping.end_on_signals()
        {where}
        time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    said = "SIGTERM: stopped; nothing is lost; run the same command again\n"
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, said)


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopping.end_on_signals()
    os.kill(os.getpid(), signal.SIGINT)
    with stopping.stopping() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() == ""
