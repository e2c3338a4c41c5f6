"""A web hook is told of the end of a run, and can neither end nor delay one that trains."""

import http.server
import json
import os
import threading

import pytest

from imgclf_jax.core import signals
from imgclf_jax.core.errors import UserError
from imgclf_jax.run import notify


@pytest.fixture
def hook(monkeypatch):
    """The posts that a local server received; it fails as often as `fail` says."""
    posts, fail = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if fail:
                fail.pop()
                self.send_error(500)
                return
            posts.append(json.loads(content))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv(notify.VARIABLE, f"http://localhost:{server.server_port}/hook?token=secret")
    monkeypatch.setattr(notify, "_WAITS", (0.0, 0.01, 0.01))
    yield posts, fail
    server.shutdown()
    thread.join()
    server.server_close()


def test_done_stopped_and_failed(hook, tmp_path):
    posts, fail = hook
    (tmp_path / "result.json").write_text('{"step": 225, "seconds": 31.4, "test": {"accuracy": 0.98888}}')
    fail.extend([1, 1])  # the third try arrives
    for status in (0, 75):
        with notify.notifying(tmp_path) as tell:
            tell(status)
    with pytest.raises(UserError), notify.notifying(tmp_path):
        raise UserError("the disk is full")
    with notify.notifying(tmp_path):  # what the watchdog and the second signal do before they end the process
        signals.before_exit[-1](1, "error: nothing has happened for 600 s")
    texts = [post["text"].removeprefix(f"{tmp_path}: ") for post in posts]
    assert texts == [
        "done: step 225, test accuracy 0.9889, 31 s", "stopped, checkpoint saved", "failed: the disk is full",
        "failed: error: nothing has happened for 600 s",
    ]  # fmt: skip
    assert [post["status"] for post in posts] == [0, 75, 1, 1]
    assert {post["workdir"] for post in posts} == {str(tmp_path)}


@pytest.mark.parametrize("url", [
    "http://localhost:9/hook?token=secret", "file:///etc/passwd?secret", "secret", "http://[secret/x",
    "https://user:secret@localhost/topic", "http://localhost:9/services/secret x", "http://localhost:secret/x",
])  # fmt: skip
def test_a_hook_that_cannot_be_reached(url, monkeypatch, tmp_path, caplog):
    """One warning, without the secret."""
    monkeypatch.setenv(notify.VARIABLE, url)
    monkeypatch.setattr(notify, "_WAITS", (0.0,))
    with notify.notifying(tmp_path) as tell:
        tell(0)
    assert caplog.text.count("could not be notified of the end of the run") == 1
    assert "secret" not in caplog.text


def test_nothing_without_the_variable(tmp_path):
    assert notify.VARIABLE not in os.environ
    before = list(signals.before_exit)
    with notify.notifying(tmp_path) as tell:
        tell(0)
        assert signals.before_exit == before
