"""The request log: one JSON object per line, in a file of bounded size or on standard error."""

import contextlib
import json
import logging
import logging.handlers
import sys
import time
from collections.abc import Callable, Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError, reason

_BYTES = 50_000_000  # of the file; an older one of this size is kept next to it
_SHOWN = 200  # characters of a path

Write = Callable[[str], object]


@contextlib.contextmanager
def open_log(file: str) -> Iterator[Write | None]:
    """Yields a function that appends a line to the file; "-" is standard error, and "" yields None.

    At 50 MB the file is renamed to FILE.1, so that clients cannot fill the disk. Raises UserError if it cannot be
    written.
    """
    if file in ("", "-"):
        yield (lambda line: print(line, file=sys.stderr, flush=True)) if file else None
        return
    path = paths.expand_user(file)
    if paths.in_bucket(path):
        raise UserError(f"--request_log={file}: this log cannot be in a bucket; name a local file")
    try:
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace"
        )
    except OSError as e:
        raise UserError(f"--request_log={file}: cannot be written ({reason(e)})") from e
    with contextlib.closing(handler):
        yield lambda line: handler.handle(logging.makeLogRecord({"msg": line}))


class RequestLog:
    """Logs the time, client, target, status and duration of each request once it is answered."""

    def __init__(self, app: ASGIApp, write: Write) -> None:
        self._app, self._write = app, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.time(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            query = scope["query_string"].decode("latin-1")
            target = scope["path"] + ("?" + query if query else "")
            self._write(json.dumps({
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begun)),
                "client": (scope.get("client") or [""])[0], "method": scope["method"][:20], "target": target[:_SHOWN],
                "status": status, "milliseconds": round(1000 * (time.time() - begun), 1),
                "images": scope.get("state", {}).get("images", 0),
            }))  # fmt: skip
