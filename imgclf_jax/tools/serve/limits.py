"""Limits on connections and on the memory of request bodies, so that no client takes the server from the others."""

import asyncio
from typing import Any

import uvicorn
from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_BODY = 20_000_000  # bytes of a request
MAX_BODIES = 128_000_000  # bytes of all requests in progress; beyond it only small ones are accepted
SMALL_BODY = 256_000
MAX_CONNECTIONS = 1000  # beyond it, requests get 503
SECONDS = 20.0
GRACE = 4  # seconds for requests in progress after a signal
_READ = 4096  # bytes that a connection reads in a turn of the event loop: h11 parses tiny chunks slowly


def server_settings(application: ASGIApp) -> uvicorn.Config:
    """The settings of a uvicorn server with these limits."""
    return uvicorn.Config(
        application, http=TimedConnection, loop="asyncio", ws="none", limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=GRACE, access_log=False, server_header=False, proxy_headers=False, log_config=None,
        log_level="critical",  # or clients could fill the log; the application logs its own failures
    )  # fmt: skip


class BoundedBodies:
    """ASGI middleware that answers 503 to large bodies while those in progress hold MAX_BODIES."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._held = app, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            more = len(message.get("body", b""))
            size, self._held = size + more, self._held + more
            if size > SMALL_BODY and self._held > MAX_BODIES:
                raise HTTPException(503, "too many large images at once; try again in a second")
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._held -= size


class TimedConnection(H11Protocol):
    """Closes a connection that begins no request for SECONDS, or whose request takes once or twice as long.

    uvicorn's own timeout is for idle connections after an answer alone.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = _READ  # type: ignore[attr-defined]
        self._timer = self.loop.call_later(SECONDS, self._close_unless_after, None)

    def _close_unless_after(self, request: Any) -> None:
        if self.cycle is request:
            self.transport.abort()  # `close` would wait until the client has received everything
        else:
            self._timer = self.loop.call_later(SECONDS, self._close_unless_after, self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)
