"""The command `serve`: a web page and an HTTP API for a trained model."""

import logging
import socket

from ml_collections import ConfigDict

from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.trained import load_trained

log = logging.getLogger(__name__)


def main(
    config: ConfigDict, workdir: Workdir | None, checkpoint: str, host: str, port: int, cors: list[str],
    temperature: float | None = None,
) -> int:  # fmt: skip
    """Serves on `host` and `port` (0 picks a free one) until SIGINT or SIGTERM.

    - `workdir` is the run to serve; None serves the weights that `init_from` names.
    - `cors` are the origins whose pages may send requests.
    - `temperature` divides the logits, instead of the run's calibration.

    Raises UserError if the port is taken.
    """
    import uvicorn

    from imgclf_jax.tools.serve import app
    from imgclf_jax.tools.serve.limits import server_settings

    model = load_trained(config, workdir, checkpoint, temperature)
    model.programs.check_predicts()
    local = host in ("localhost", "127.0.0.1", "::1")
    name = workdir.path.absolute().name if workdir else ""
    # A page of the web whose name resolves to this machine is refused.
    hosts = ("localhost", "127.0.0.1", "[::1]") if local else ("*",)
    application = app.build(model, name, hosts, cors)
    settings = server_settings(application)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=settings.backlog)
    except (OSError, OverflowError) as e:
        why = reason(e).partition(" (while")[0]  # Python adds the address
        raise UserError(f"serve: cannot listen on {host}:{port} ({why}); pass another --port or --host") from e
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it for sockets of its own alone
    with listening:
        url = f"http://{f'[{host}]' if ':' in host else host or '0.0.0.0'}:{listening.getsockname()[1]}"
        print(f"serving step {model.step} of {config.model} at {url}; press Ctrl-C to stop", flush=True)
        if not local:
            log.warning("anyone who can reach %s can use it: there is no authentication", url)
        uvicorn.Server(settings).run(sockets=[listening])
    return 0
