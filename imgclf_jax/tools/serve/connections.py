"""Limits on connections: the length of headers, the time of a request, and the connections per client."""

import asyncio
import contextlib
import functools
import ipaddress
import json
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CLIENT_GONE = "the client has disconnected"  # the message of the cancellation
_TOLD = 64  # concurrent connections refused with an answer; further ones are reset
# Listening sockets that share one queue. libuv accepts one connection per socket and iteration of the event loop: with
# a single socket a new client would wait for as many iterations as there are connections before it.
_LISTENERS = 32
_PIPELINED = 100  # waiting requests of a connection
# The parser calls back for each chunk of a body. Beyond _CHUNKS, chunks must have _BYTES_A_CHUNK bytes on average.
_CHUNKS, _BYTES_A_CHUNK = 1000, 64


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on one connection, and on the number of open connections."""

    headers_bytes: int = 32_768  # longer headers are refused; up to half of it always passes
    headers_seconds: float = 10.0  # from the connection or the last answer until the headers are complete
    request_seconds: float = 60.0  # from complete headers until the client has received the answer
    connections: int = 512
    of_a_client: int = 256  # per IPv4 address or IPv6 /64 network
    grace_seconds: float = 4.0  # for requests in progress when the server is told to stop
    # From a refusal until the connection closes. Closing at once would reset it, and a client that is still sending
    # would not see the answer.
    linger_seconds: float = 1.0


class Server(uvicorn.Server):
    """Exits normally after a signal, where uvicorn would raise it again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def server_settings(
    application: ASGIApp, host: str, port: int, limits: ConnectionLimits = ConnectionLimits()
) -> uvicorn.Config:
    """The settings of a uvicorn server with these limits."""
    return uvicorn.Config(
        application, host, port, http=guarded(limits), ws="none", log_config=None,
        log_level="critical",  # or clients could fill the log; the application logs its own failures
        access_log=False, timeout_keep_alive=10, server_header=False,
        timeout_graceful_shutdown=limits.grace_seconds,  # type: ignore[arg-type]
        proxy_headers=False,
    )  # fmt: skip


def listeners(listening: socket.socket) -> list[socket.socket]:
    """`listening` and duplicates of it; a server of all of them accepts as many clients at once."""
    return [listening, *(listening.dup() for _ in range(_LISTENERS - 1))]


def guarded(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """Returns a subclass of uvicorn's HTTP protocol that enforces the limits; each counts its own connections.

    httptools buffers a header until it ends. So this class counts the bytes since the parser's last callback.
    """
    clients, told = Counter[str](), Counter[str]()  # open connections per client: served, and refused

    class Guarded(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._unparsed = 0  # bytes since the headers, a chunk of the body or the message were complete
            self._answering: asyncio.Task[Any] | None = None  # the task that answers a request
            self._refused = False
            self._begun = 0  # unanswered requests; the parser takes all that have arrived
            self._lacking = 0  # bytes by which the chunks of a body fall short of _BYTES_A_CHUNK
            app = self.app

            async def timed(scope: Any, receive: Any, send: Any) -> None:
                if self.transport.is_closing():
                    return
                self._unparsed, self._answering = 0, asyncio.current_task()
                self._allow(limits.request_seconds)

                async def send_if_open(message: Any) -> None:
                    try:
                        await send(message)
                    except RuntimeError:  # from uvloop, if the connection was aborted
                        if not self.transport.is_closing():
                            raise

                try:
                    await app(scope, receive, send_if_open)
                finally:
                    self._begun = max(0, self._begun - 1)
                    self._unparsed, self._answering = 0, None
                    self._allow(limits.headers_seconds)

            self.app = timed

        def connection_made(self, transport: Any) -> None:
            peer = transport.get_extra_info("peername")
            self._client = client_of(peer[0] if isinstance(peer, tuple) else "")
            # Refused connections are counted apart, so that those of one client do not displace other clients.
            full = clients.total() >= limits.connections or clients[self._client] >= limits.of_a_client
            self._counter = told if full else clients
            self._counter[self._client] += 1
            super().connection_made(transport)
            self._allow(limits.headers_seconds)
            self._timer = self.loop.call_later(limits.headers_seconds, self._expire)
            if full and told.total() > _TOLD:
                transport.abort()
            elif full:
                self._refuse(503, "too many connections; close some, or try again in a second")

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            self._counter[self._client] -= 1
            if not self._counter[self._client]:
                del self._counter[self._client]
            super().connection_lost(exc)
            if self._answering:  # uvicorn would finish work that nobody wants, while others wait
                self._answering.cancel(CLIENT_GONE)

        def data_received(self, data: bytes) -> None:
            most = limits.headers_bytes // 2
            for start in range(0, len(data), most):  # in pieces, so that a long header is noticed before its end
                if self._refused or self.transport.is_closing():
                    return
                part = data if len(data) <= most else data[start : start + most]
                self._unparsed += len(part)
                self._unset_keepalive_if_required()
                self._parse(part)
                if self._unparsed > most:
                    self._refuse(431, f"the request's headers are longer than {most:,} bytes")

        def _parse(self, data: bytes) -> None:
            """Parses data, ignoring any offer to upgrade the protocol (RFC 9110, 7.8), such as to HTTP/2.

            httptools skips the body of a request with an offer and parses nothing after it. So another parser gets the
            headers once more, without the offer.
            """
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserError:
                self._refuse(400, "this is not an HTTP request")
            except httptools.HttpParserUpgrade as e:
                if not self._offers_upgrade():
                    return
                start = [self.parser.get_method(), self.url, b"HTTP/" + self.parser.get_http_version().encode()]
                headers = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self._parse(b"\r\n".join([b" ".join(start), *headers, b"", data[e.args[0] :]]))

        def _offers_upgrade(self) -> bool:
            return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

        # The parser's callbacks.
        def on_headers_complete(self) -> None:
            if self._offers_upgrade():
                return
            self._unparsed = self._lacking = 0
            super().on_headers_complete()
            self._begun += 1
            if self._begun > _PIPELINED:
                self.transport.abort()

        def on_body(self, body: bytes) -> None:
            self._unparsed = 0
            self._lacking = max(0, self._lacking + _BYTES_A_CHUNK - len(body))
            if self._lacking > _CHUNKS * _BYTES_A_CHUNK:  # all other clients wait while tiny chunks are parsed
                self.transport.abort()
            super().on_body(body)

        def on_message_complete(self) -> None:
            if self._offers_upgrade():
                return
            self._unparsed = 0
            super().on_message_complete()
            if not (self.pipeline or self._refused or self.transport.is_closing()):
                self.flow.resume_reading()  # a large body paused it; without it nobody notices that the client has gone

        def _refuse(self, status: int, message: str) -> None:
            if self._refused or self.transport.is_closing():
                return
            if self._begun:  # a refusal must not overtake the answer of the request before it
                self.transport.abort()
                return
            self._refused = True
            if self.transport.is_reading():
                self.transport.pause_reading()
            body = json.dumps({"error": message}).encode()
            head = (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n")  # fmt: skip
            self.transport.write(head.encode() + body)
            self._allow(limits.linger_seconds)
            self._timer.cancel()
            self._timer = self.loop.call_later(limits.linger_seconds, self._expire)

        def _allow(self, seconds: float) -> None:
            self._until = self.loop.time() + seconds

        def _expire(self) -> None:
            """Ends the connection if its time is up; otherwise checks again when it will be."""
            left = self._until - self.loop.time()
            if left > 0:
                self._timer = self.loop.call_later(left, self._expire)
            elif self._unparsed and not (self._refused or self._answering or self.transport.is_closing()):
                self._refuse(408, f"the request's headers did not arrive within {limits.headers_seconds:g} s")
            else:
                self.transport.abort()  # `close` would wait until the client has received everything

    return Guarded


@functools.lru_cache(1024)
def client_of(host: str) -> str:
    """Identifies a client: by IPv4 address, or by the /64 network of an IPv6 address, which one client may own."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64))) if address.version == 6 else host
