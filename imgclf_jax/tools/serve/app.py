"""The web application: a page for people, `POST /predict` for programs, and routes for those who run it."""

import asyncio
import contextlib
import functools
import json
import logging
import re
import time
from collections import Counter as Counts
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib import resources

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import utf8
from imgclf_jax.tools.serve import openapi
from imgclf_jax.tools.serve.batcher import Batcher, Busy
from imgclf_jax.tools.serve.connections import CLIENT_GONE, client_of
from imgclf_jax.trained import Trained

log = logging.getLogger(__name__)

# The page asks this server alone, and no other page may show it inside of itself.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]


@dataclass(frozen=True)
class Limits:
    """What one request may take, and how many there may be."""

    body_bytes: int = 20_000_000
    body_seconds: float = 15.0  # in which a client must have sent it
    answer_seconds: float = 30.0
    # What all requests share. A client may take no more of it than it leaves free.
    requests: int = 256  # that are answered at once, once their bodies are here
    small_body_bytes: int = 256_000  # up to which a body is small
    small_bodies_bytes: int = 32_000_000
    large_bodies_bytes: int = 96_000_000


class Refused(Exception):
    """A request that is not answered: the HTTP status and one sentence."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class _Numbers:
    """What `/metrics` shows, in Prometheus' format."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make = functools.partial(Counter, registry=self.registry)
        self.requests = make("imgclf_requests", "Requests with an image by HTTP status", ["route", "status"])
        histogram = functools.partial(Histogram, registry=self.registry)
        self.seconds = histogram("imgclf_seconds", "Seconds from a request's first byte to its answer")
        self.batches = histogram("imgclf_batch_images", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128))


Explain = Callable[[bytes], bytes]  # an image's file → a PNG of where its class is found


def build(
    model: Trained, limits: Limits = Limits(), hosts: tuple[str, ...] = ("*",), explain: Explain | None = None
) -> Starlette:
    """The application; it answers requests for these host names alone. Compiles the model's programs.

    With `explain`, which may raise UserError, there is the route /explain. After it has ended, `state.idle(seconds)` of
    the application waits for threads that still work, and says whether all are idle.
    """
    numbers = _Numbers()
    batcher = Batcher(model, most_waiting=2 * limits.requests, seen=numbers.batches.observe)
    answering, bodies = _Share(limits.requests), _Bodies(limits)

    async def classify(request: Request, client: str, body: bytes) -> Response:
        top_k = _top_k(request, len(model.class_names))
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(limits.answer_seconds):
                probabilities = await batcher.predict(body)
        except UserError as e:
            raise Refused(422, str(e)) from e
        except Busy:
            raise Refused(503, "too many requests wait; try again in a second") from None
        except TimeoutError:
            raise Refused(503, f"no answer within {limits.answer_seconds:g} s; try again later") from None
        found = model.describe(probabilities, top_k)
        if "predictions" in found:
            found["predictions"] = [one | {"class": utf8(one["class"])} for one in found["predictions"]]
        return _Answer({
            **found,
            "milliseconds": round(1000 * (time.perf_counter() - begun), 3),
        })  # fmt: skip

    async def picture(request: Request, client: str, body: bytes) -> Response:
        assert explain
        try:
            async with asyncio.timeout(limits.answer_seconds):
                made = await batcher.alone(client, explain, body)
        except TimeoutError:
            raise Refused(503, f"no picture within {limits.answer_seconds:g} s; try again later") from None
        if isinstance(made, UserError):
            raise Refused(422, str(made))
        return Response(made, headers=_HEADERS, media_type="image/png")

    async def predict(request: Request) -> Response:
        return await answer("/predict", request, classify)

    async def explained(request: Request) -> Response:
        return await answer("/explain", request, picture)

    async def answer(
        route: str, request: Request, make: Callable[[Request, str, bytes], Awaitable[Response]]
    ) -> Response:
        begun = time.perf_counter()
        client = client_of(request.client.host if request.client else "")
        try:
            async with bodies.read(request, client) as body:
                with answering.held(client, "too many requests at once; try again in a second"):
                    response = await make(request, client, body)
        except Refused as refused:
            response = _refusal(refused)
        except ClientDisconnect:
            response = _refusal(Refused(499, CLIENT_GONE))
        except asyncio.CancelledError as e:  # or by the server, when the time to answer after a signal is over
            gone = str(e) == CLIENT_GONE
            response = _refusal(Refused(499, CLIENT_GONE) if gone else Refused(503, "the server ends"))
        numbers.requests.labels(route, str(response.status_code)).inc()
        numbers.seconds.observe(time.perf_counter() - begun)
        return response

    async def health(request: Request) -> Response:
        config = model.config
        return JSONResponse({"status": "ok", "model": config.model, "step": model.step, "waiting": batcher.waiting,
                             "task": model.task.value, "explains": explain is not None,
                             "classes": [utf8(name) for name in model.class_names]}, headers=_HEADERS)  # fmt: skip

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(numbers.registry), headers=_HEADERS, media_type="text/plain; version=0.0.4")

    async def interface(request: Request) -> Response:
        return JSONResponse(
            openapi.describe(model.class_names, limits.body_bytes, explain is not None, model.task), headers=_HEADERS
        )

    @contextlib.asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()
        app.state.idle = batcher.close

    async def failed(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _refusal(Refused(500, "the server failed; its log says why"))

    return Starlette(
        routes=[  # that of programs first: the others are tried before it otherwise, for each request
            Route("/predict", predict, methods=["POST"]),
            Route("/", _file("page.html", "text/html")),
            Route("/page.css", _file("page.css", "text/css")),
            Route("/page.js", _file("page.js", "text/javascript")),
            *([Route("/explain", explained, methods=["POST"])] if explain else []),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/openapi.json", interface),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(_OwnPagesOnly),
        ],
        exception_handlers={Exception: failed},
        lifespan=running,
    )


class _Answer(Response):
    """A JSON value, by an encoder and with headers that are made once: requests to `/predict` may be many."""

    def __init__(self, value: object) -> None:
        self.status_code, self.background = 200, None
        self.body = _JSON.encode(value).encode()
        length = (b"content-length", str(len(self.body)).encode())
        self.raw_headers = [length, (b"content-type", b"application/json"), *_RAW_HEADERS]


class _OwnPagesOnly:
    """Refuses requests with two `Host` headers, and requests from pages of other sites (by `Origin`)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            hosts = headers.getlist("host")
            if len(hosts) > 1 or (not hosts and scope["http_version"] == "1.1"):  # RFC 9112, section 3.2
                refused = Refused(400, f"the request has {len(hosts)} Host headers; send one")
                await _refusal(refused)(scope, receive, send)
                return
            host = hosts[0].lower() if hosts else ""
            if any(origin.lower().partition("://")[2] != host for origin in headers.getlist("origin")):
                refused = Refused(403, "a page of another site sent this request; only this server's own page may")
                await _refusal(refused)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Share:
    """A number of something that requests share. A client may take no more than it leaves free, so never the last."""

    def __init__(self, total: int) -> None:
        self._free, self._taken = total, Counts[str]()

    def take(self, client: str, number: int) -> bool:
        """Whether the client may have so many more, and has them now."""
        if self._taken[client] + number > self._free - number:
            return False
        self._free -= number
        self._taken[client] += number
        return True

    def give_back(self, client: str, number: int) -> None:
        """The client has so many no longer."""
        self._free += number
        self._taken[client] -= number
        if not self._taken[client]:
            del self._taken[client]

    @contextlib.contextmanager
    def held(self, client: str, message: str) -> Iterator[None]:
        """One of them is the client's, inside. Raises Refused with the message if it may have no more."""
        if not self.take(client, 1):
            raise Refused(503, message)
        try:
            yield
        finally:
            self.give_back(client, 1)


class _Bodies:
    """Reads the bodies of requests. Small ones together take a bounded number of bytes, and so do large ones."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._small, self._large = _Share(limits.small_bodies_bytes), _Share(limits.large_bodies_bytes)

    @contextlib.asynccontextmanager
    async def read(self, request: Request, client: str) -> AsyncIterator[bytes]:
        """The request's body. Raises Refused as soon as it is too long or too slow, or all together take too much."""
        limits, size, share = self._limits, 0, self._small
        too_long = Refused(413, f"the body is longer than {limits.body_bytes:,} bytes; send a smaller image")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > limits.body_bytes):
            raise too_long
        parts = []
        try:
            try:
                async with asyncio.timeout(limits.body_seconds):
                    async for part in request.stream():
                        whole = size + len(part)
                        if whole > limits.body_bytes:
                            raise too_long
                        grows = share is self._small and whole > limits.small_body_bytes
                        wanted, more = (self._large, whole) if grows else (share, len(part))
                        if not wanted.take(client, more):
                            raise Refused(503, "too many bytes of images at once; try again in a second")
                        if grows:
                            share.give_back(client, size)
                        size, share = whole, wanted
                        parts.append(part)
            except TimeoutError:
                raise Refused(408, f"the body did not come within {limits.body_seconds:g} s") from None
            if not size:
                raise Refused(400, "the body is empty; it is to be the bytes of an image file")
            body = b"".join(parts)
            del parts
            yield body
        finally:
            share.give_back(client, size)


def _top_k(request: Request, classes: int) -> int:
    text = request.query_params.get("top_k", "5")
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise Refused(400, f"top_k={text[:20]}: wants a whole number from 1 to 999999999")
    return min(int(text), classes)


def _refusal(refused: Refused) -> Response:
    headers = dict(_HEADERS)
    if refused.status in (403, 408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    if refused.status == 503:
        headers["Retry-After"] = "1"
    return JSONResponse({"error": refused.message}, refused.status, headers)


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files("imgclf_jax.tools.serve").joinpath(name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return send
