"""The command `serve`: a page and an interface for programs that classify images with a trained model."""

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
from imgclf_jax.tools.explain.explanations import build, drawn, predict
from imgclf_jax.trained import Trained, load_trained, not_finite, report_host_ops

log = logging.getLogger(__name__)

_LAST_SECONDS = 4.0  # for threads that still work, once the server has ended
_WANTS = ("starlette", "uvicorn", "prometheus_client")


def main(config: ConfigDict, workdir: Workdir | None, checkpoint: str, host: str, port: int) -> int:
    """The command `serve`: answers requests on `host` and `port` until SIGINT or SIGTERM; port 0 takes a free one.

    Requests that are being answered at a signal are answered within some seconds. It serves the run in `workdir` or, if
    that is None, the weights that `init_from` names. Raises UserError if a package is missing or the port is taken.
    """
    if missing := [name for name in _WANTS if not importlib.util.find_spec(name)]:
        raise UserError(
            f"serve: {', '.join(missing)} not installed; run it as `uv run --extra serve launch.py serve …`"
        )
    if port > 65535:
        raise UserError(f"serve: --port={port}: ports are 0 to 65535")
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
        raise UserError(f"serve: {host}:{port} cannot be used ({reason(e)}); pass another --port or --host") from e
    where = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    print(f"serving step {model.step} of {config.model} at {where}; Ctrl-C ends it", flush=True)
    if not local:
        log.warning("whoever reaches %s may use it: there are no passwords", where)
    with listening:
        _server(uvicorn.Server, settings).run(sockets=[listening])
    if not application.state.idle(_LAST_SECONDS):
        sys.stdout.flush()
        os._exit(0)  # Python would wait for threads, and one may be decoding an image that takes minutes
    return 0


def explainer(model: Trained) -> Callable[[bytes], bytes]:
    """The function of an image's file that gives a PNG of where its likeliest class is found, by the usual method.

    Of a regression it is the first target.
    """
    numbers = model.task is Task.REGRESSION
    method, explain = build(model)

    def draw(content: bytes) -> bytes:
        pixels = model.prepare(content)
        [probabilities] = predict(model, pixels[None])
        if wrong := not_finite(probabilities, "predict"):
            raise UserError(f"{wrong}, so serve another --checkpoint")
        label = 0 if numbers else int(probabilities.argmax())
        what = "value" if numbers else "probability"
        says = f"{model.class_names[label]}, {what} {probabilities[label]:.4f}"
        return drawn(method, explain, pixels, label, says, numbers)[0]

    return draw


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _server[T](base: type[T], settings: object) -> T:
    class Server(base):  # type: ignore[misc, valid-type]
        """Ends without raising the signal once more: a server that is told to end has done its work."""

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
