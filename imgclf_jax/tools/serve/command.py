"""The command `serve`: a web page and an HTTP API for a trained model."""

import base64
import ipaddress
import json
import logging
import os
import re
import socket
import sys
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.text import decimals, escape_surrogates, utf8
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.explain import heatmap
from imgclf_jax.tools.explain.explanations import build, draw, predict
from imgclf_jax.trained import Trained, load_trained, not_finite, report_host_ops

if TYPE_CHECKING:
    from imgclf_jax.tools.serve.app import Explain

log = logging.getLogger(__name__)

_LAST_SECONDS = 4.0  # for threads to finish after the server has stopped


def main(
    config: ConfigDict, workdir: Workdir | None, checkpoint: str, host: str, port: int, cors: list[str],
    request_log: str,
) -> int:  # fmt: skip
    """Serves on `host` and `port` (0 picks a free one) until SIGINT or SIGTERM, with a grace period of some seconds.

    - `workdir` is the run to serve; None serves the weights that `init_from` names.
    - `cors` are the origins whose pages may send requests.
    - `request_log` is the file for the log of requests, "-" for standard error, "" for none.

    Raises UserError if the port is taken, or the log cannot be written.
    """
    if port > 65535:
        raise UserError(f"serve: --port={port}: must be 0 to 65535")
    for origin in cors:
        if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
            raise UserError(f"serve: --cors={origin}: must be an origin, such as https://a.example, or *")
    from imgclf_jax.tools.serve import app
    from imgclf_jax.tools.serve.connections import Server, listeners, server_settings
    from imgclf_jax.tools.serve.request_log import open_log

    with open_log(request_log) as write:
        model = load_trained(config, workdir, checkpoint)
        model.programs.check_predicts()
        report_host_ops(model.programs)
        local = _is_loopback(host)
        hosts = ("localhost", "127.0.0.1", "[::1]", host) if local else ("*",)
        name = utf8(workdir.path.absolute().name) if workdir else ""
        application = app.build(model, hosts=hosts, explain=explainer(model), name=name, cors=cors, request_log=write)
        settings = server_settings(application, host, port)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, port), family=family, backlog=settings.backlog)
        except OSError as e:
            raise UserError(
                f"serve: cannot listen on {host}:{port} ({reason(e)}); pass another --port or --host"
            ) from e
        url = f"http://{f'[{host}]' if ':' in host else host or '0.0.0.0'}:{listening.getsockname()[1]}"
        server = Server(settings)
        with listening, server.capture_signals():
            print(f"serving step {model.step} of {config.model} at {url}; press Ctrl-C to stop", flush=True)
            if not local:
                log.warning("anyone who can reach %s can use it: there is no authentication", url)
            server.run(sockets=listeners(listening))
    if not application.state.idle(_LAST_SECONDS):
        sys.stdout.flush()
        os._exit(0)  # a normal exit would wait for threads, which may decode an image for minutes
    return 0


def explainer(model: Trained) -> "Explain":
    """Returns the function that answers /explain.

    The PNG is that of the command `explain`. The JSON holds the preprocessed image, its heatmap at the same size and
    the ends of the color scale, so that a page can lay one over the other.
    """
    names = list(map(escape_surrogates, model.class_names))
    predicted = build(model)
    chosen = build(model, for_class=True) if predicted[0] == "rollout" else predicted  # which no class changes

    def explain_image(content: bytes, wanted: str, format: str) -> bytes:
        pixels = model.prepare(content)
        outputs, ranking = predict(model, pixels[None], ranked=True)[:, 0]
        if error := not_finite(outputs, "predict"):
            raise UserError(f"{error}, so serve another --checkpoint")
        label = names.index(wanted) if wanted else int(ranking.argmax())
        method, explain = chosen if wanted else predicted
        title = f"{names[label]}, probability {decimals(outputs[label])}"
        picture, values = draw(method, explain, pixels, label, title)
        if format == "png":
            return picture
        signed = method == "occlusion"
        layers = {"image": pixels, "heatmap": heatmap.color(values, pixels.shape[:2], signed)}
        ends = heatmap.ends(values, signed)
        return json.dumps({
            "class": names[label], "probability": float(outputs[label]), "method": method, "lowest": ends[0],
            "highest": ends[1], "height": pixels.shape[0], "width": pixels.shape[1],
            **{key: "data:image/png;base64," + base64.b64encode(heatmap.png(value)).decode()
               for key, value in layers.items()},
        }).encode()  # fmt: skip

    return explain_image


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
