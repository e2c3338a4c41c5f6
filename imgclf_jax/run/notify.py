"""Posts one line about the end of a run to a web hook: the environment variable IMGCLF_NOTIFY."""

import contextlib
import json
import logging
import os
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from imgclf_jax.core import processes, signals
from imgclf_jax.core.errors import reason
from imgclf_jax.run.workdir import Workdir

log = logging.getLogger(__name__)

VARIABLE = "IMGCLF_NOTIFY"
_WAITS = (0.0, 1.0, 4.0)  # seconds before each try
_TIMEOUT = 5.0  # seconds that a try may take
_WORDS = {0: "done", signals.STATUS_SAVED: "stopped, checkpoint saved", 1: "failed"}


@contextlib.contextmanager
def notifying(workdir: Path) -> Iterator[Callable[[int], None]]:
    """Posts {"text", "workdir", "status"} to the URL in IMGCLF_NOTIFY, if it is set, when the block ends.

    Yields a function to call with the exit status. An error inside the block is status 1, with its message, and so is
    an end by a signal or the watchdog. Only process 0 posts. A web hook that does not answer costs some seconds at the
    end and a warning, never the run. The URL may hold a secret, so no record and no log line contains it.
    """
    url = os.environ.get(VARIABLE, "")
    if not url or processes.index():
        yield lambda status: None
        return
    sent = False

    def tell(status: int, detail: str = "", tries: int = len(_WAITS)) -> None:
        nonlocal sent
        if not sent:
            sent = True
            text = f"{workdir}: {_WORDS.get(status, f'ended with status {status}')}{detail and f': {detail}'}"
            _post(url, {"text": text, "workdir": str(workdir), "status": status}, _WAITS[:tries])

    def leave(status: int, line: str) -> None:
        tell(status, line, tries=1)

    signals.before_exit.append(leave)
    try:
        yield lambda status: tell(status, _summary(workdir) if status == 0 else "")
    except BaseException as e:
        tell(1, reason(e))
        raise
    finally:
        signals.before_exit.remove(leave)


def _summary(workdir: Path) -> str:
    """The main results of the run, in words."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        result = Workdir(workdir).read_result()
        scores = [f"{name} accuracy {values['accuracy']:.4f}" for name, values in result.items()
                  if isinstance(values, dict) and "accuracy" in values]  # fmt: skip
        return ", ".join([f"step {result['step']}", *scores, f"{result['seconds']:.0f} s"])
    return ""


def _post(url: str, content: dict[str, object], waits: tuple[float, ...]) -> None:
    where, error = _host(url), "the URL must begin with https:// or http://"
    for wait in waits if where else ():
        time.sleep(wait)
        try:
            data = json.dumps(content).encode()
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=_TIMEOUT):
                return
        except Exception as e:  # of the network, of the server, or of the URL, which its message may quote
            error = type(e).__name__
    log.warning("%s: the web hook at %s could not be notified of the end of the run (%s)", VARIABLE,
                where or "a URL without a host", error)  # fmt: skip


def _host(url: str) -> str:
    """The host of a web hook; "" for text that is no http or https URL."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        return (parts.hostname or "") if parts.scheme in ("http", "https") else ""
    return ""
