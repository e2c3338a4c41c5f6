"""The command `serve`: a web page and an HTTP API for a trained model."""

import contextlib
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.losses import Task
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.explain.explanations import build, draw, predict
from imgclf_jax.trained import Trained, load_trained, not_finite, report_host_ops

log = logging.getLogger(__name__)

_LAST_SECONDS = 4.0  # for threads to finish after the server has stopped
_REQUIRED = ("starlette", "uvicorn", "prometheus_client")


def main(config: ConfigDict, workdir: Workdir | None, checkpoint: str, host: str, port: int) -> int:
    """Serves on `host` and `port` (0 picks a free one) until SIGINT or SIGTERM, with a grace period of some seconds.

    `workdir` is the run to serve; None serves the weights that `init_from` names. Raises UserError if a package is
    missing or the port is taken.
    """
    if missing := [name for name in _REQUIRED if not importlib.util.find_spec(name)]:
        raise UserError(f"serve needs {', '.join(missing)}; run it with `uv run --extra serve launch.py serve …`")
    if port > 65535:
        raise UserError(f"serve: --port={port}: must be 0 to 65535")
    import uvicorn

    from imgclf_jax.tools.serve import app
    from imgclf_jax.tools.serve.connections import server_settings

    model = load_trained(config, workdir, checkpoint)
    model.programs.check_predicts()
    report_host_ops(model.programs)
    local = _is_loopback(host)
    hosts = ("localhost", "127.0.0.1", "[::1]", host) if local else ("*",)
    application = app.build(model, hosts=hosts, explain=explainer(model))
    settings = server_settings(application, host, port)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=settings.backlog)
    except OSError as e:
        raise UserError(f"serve: cannot listen on {host}:{port} ({reason(e)}); pass another --port or --host") from e
    url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    print(f"serving step {model.step} of {config.model} at {url}; press Ctrl-C to stop", flush=True)
    if not local:
        log.warning("anyone who can reach %s can use it: there is no authentication", url)
    with listening:
        _server(uvicorn.Server, settings).run(sockets=[listening])
    if not application.state.idle(_LAST_SECONDS):
        sys.stdout.flush()
        os._exit(0)  # a normal exit would wait for threads, which may decode an image for minutes
    return 0


def explainer(model: Trained) -> Callable[[bytes], bytes]:
    """Returns a function from an image file to a PNG heatmap of its most likely class, or first regression target."""
    regression = model.task is Task.REGRESSION
    method, explain = build(model)

    def explain_image(content: bytes) -> bytes:
        pixels = model.prepare(content)
        [probabilities] = predict(model, pixels[None])
        if error := not_finite(probabilities, "predict"):
            raise UserError(f"{error}, so serve another --checkpoint")
        label = 0 if regression else int(probabilities.argmax())
        title = f"{model.class_names[label]}, {'value' if regression else 'probability'} {probabilities[label]:.4f}"
        return draw(method, explain, pixels, label, title, regression)[0]

    return explain_image


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _server[T](base: type[T], settings: object) -> T:
    class Server(base):  # type: ignore[misc, valid-type]
        """Exits normally after a signal, where uvicorn would raise it again."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    made: T = Server(settings)
    return made
