"""The web application: a page for people, `POST /predict` for programs, and routes for operators."""

import asyncio
import contextlib
import functools
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from html import escape
from importlib import resources

import jax
import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from imgclf_jax import __version__
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.text import escape_surrogates, printable
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.tools.serve import openapi
from imgclf_jax.tools.serve.batcher import Batcher
from imgclf_jax.tools.serve.bodies import Bodies, Sent
from imgclf_jax.tools.serve.connections import CLIENT_GONE, client_of
from imgclf_jax.tools.serve.limits import Limits, Refused, Share
from imgclf_jax.tools.serve.request_log import RequestLog, Write
from imgclf_jax.trained import Trained

log = logging.getLogger(__name__)

_LIMITS = Limits()

# The page connects to this server only, and no other page may embed it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class _Numbers:
    """The Prometheus metrics of `/metrics`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make = functools.partial(Counter, registry=self.registry)
        self.requests = make("imgclf_requests", "Requests with an image by HTTP status", ["route", "status"])
        histogram = functools.partial(Histogram, registry=self.registry)
        self.seconds = histogram("imgclf_seconds", "Seconds from a request's first byte to its answer")
        self.batches = histogram("imgclf_batch_images", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128))


# (bytes of an image file, class name or "" for the predicted class, "png" or "json") → a heatmap as PNG or JSON
Explain = Callable[[bytes, str, str], bytes]
Make = Callable[[Request, str, Sent], Awaitable[Response]]


def build(
    model: Trained, limits: Limits = _LIMITS, hosts: Sequence[str] = ("*",), explain: Explain | None = None,
    name: str = "", cors: Sequence[str] = (), request_log: Write | None = None,
) -> Starlette:  # fmt: skip
    """Builds the application and compiles the model's programs.

    - `hosts` are the only host names that it answers to.
    - `explain`, which may raise UserError, answers the route /explain.
    - `name` is what the page and /model call the model.
    - `cors` are the origins, such as "https://a.example", whose pages may send requests; "*" allows any.
    - `request_log` is called with a line for each request.

    After the application has ended, its `state.idle(seconds)` waits for busy threads, and returns whether all are idle.
    """
    numbers = _Numbers()
    batcher = Batcher(model, most_waiting=2 * limits.requests, seen=numbers.batches.observe)
    answering, bodies = Share(limits.requests), Bodies(limits)
    class_names = list(map(escape_surrogates, model.class_names))

    def as_json(outputs: np.ndarray, top_k: int) -> JsonObject:
        found = model.describe(outputs, top_k)
        if "predictions" in found:
            found["predictions"] = [one | {"class": escape_surrogates(one["class"])} for one in found["predictions"]]
        return found

    async def classify(request: Request, client: str, sent: Sent) -> Response:
        top_k = _top_k(_parameters(request, "top_k", "topk"), len(model.class_names))
        begun = time.perf_counter()
        found = [as_json(row, top_k) for row in await _predict_all(batcher, client, sent)]
        milliseconds = round(1000 * (time.perf_counter() - begun), 3)
        return _json({**({"images": found} if sent.listed else found[0]), "milliseconds": milliseconds})

    async def picture(request: Request, client: str, sent: Sent) -> Response:
        assert explain
        given = _parameters(request, "class", "format")
        wanted, format = given.get("class", ""), given.get("format", "png")
        if wanted and wanted not in class_names:
            raise Refused(404, unknown("class", wanted[:100], class_names))
        if format not in ("png", "json"):
            raise Refused(400, unknown("format", format[:100], ("png", "json")))
        if len(sent.images) > 1:
            raise Refused(400, f"{len(sent.images)} images; /explain takes one")
        made = await batcher.alone(client, lambda image: explain(image, wanted, format), sent.images[0])
        if isinstance(made, UserError):
            raise Refused(422, str(made))
        return Response(made, headers=_HEADERS, media_type="image/png" if format == "png" else "application/json")

    async def answer(route: str, make: Make, request: Request) -> Response:
        begun = time.perf_counter()
        client = client_of(request.client.host if request.client else "")
        try:
            async with bodies.read(request, client) as sent:
                request.state.images = len(sent.images)
                with answering.held(client, len(sent.images), "too many requests at once; try again in a second"):
                    async with asyncio.timeout(limits.answer_seconds):
                        response = await make(request, client, sent)
        except Refused as refused:
            response = _refusal(refused)
        except TimeoutError:
            response = _refusal(Refused(503, f"no answer within {limits.answer_seconds:g} s; try again later"))
        except ClientDisconnect:
            response = _refusal(Refused(499, CLIENT_GONE))
        except asyncio.CancelledError as e:  # by the server, if the grace time after a signal is over
            gone = str(e) == CLIENT_GONE
            response = _refusal(Refused(499, CLIENT_GONE) if gone else Refused(503, "the server is stopping"))
        numbers.requests.labels(route, str(response.status_code)).inc()
        numbers.seconds.observe(time.perf_counter() - begun)
        return response

    async def health(request: Request) -> Response:
        return _json({"status": "ok", "model": model.config.model, "step": model.step, "waiting": batcher.waiting})

    height, width, channels = model.programs.recipe.data.image_shape
    described = {
        "name": escape_surrogates(name), "model": model.config.model, "step": model.step, "task": model.task.value,
        "classes": class_names, "explains": explain is not None,
        "input": {"height": height, "width": width, "channels": channels,
                  "preprocess": model.programs.preprocess_eval},
        "parameters": sum(x.size for x in jax.tree.leaves(model.state.params)),
        "params_sha256": model.params_sha256, "version": __version__,
        "limits": {"body_bytes": limits.body_bytes, "images": limits.images},
    }  # fmt: skip

    async def describe(request: Request) -> Response:
        return _json(described)

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(numbers.registry), headers=_HEADERS, media_type="text/plain; version=0.0.4")

    async def interface(request: Request) -> Response:
        return _json(openapi.describe(class_names, limits, explain is not None, model.task))

    @contextlib.asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()
        app.state.idle = batcher.close

    async def failed(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _refusal(Refused(500, "the server failed; its log says why"))

    routes = [  # /predict first, since routes are tried in order for each request
        Route("/predict", functools.partial(answer, "/predict", classify), methods=["POST"]),
        Route("/", _file("page.html", "text/html", name or model.config.model)),
        Route("/page.css", _file("page.css", "text/css")),
        Route("/page.js", _file("page.js", "text/javascript")),
        *([Route("/explain", functools.partial(answer, "/explain", picture), methods=["POST"])] if explain else []),
        Route("/model", describe),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/openapi.json", interface),
    ]

    async def not_found(request: Request, error: HTTPException) -> Response:
        path = printable(request.url.path[:100])
        if error.status_code == 405:
            text = f"{request.method[:20]} {path}: this route takes {error.headers['Allow'] if error.headers else ''}"
        else:
            text = f"{path}: no such route; the routes are {', '.join(route.path for route in routes)}"
        return _refusal(Refused(error.status_code, text), error.headers)

    return Starlette(
        routes=routes,
        middleware=[
            *([Middleware(RequestLog, write=request_log)] if request_log else []),
            Middleware(_OwnPagesOnly, hosts=hosts, cors=cors),
            *([Middleware(CORSMiddleware, allow_origins=cors, allow_methods=("GET", "POST"), allow_headers=["*"])]
              if cors else []),
        ],
        exception_handlers={HTTPException: not_found, Exception: failed},  # type: ignore[dict-item]
        lifespan=running,
    )  # fmt: skip


async def _predict_all(batcher: Batcher, client: str, sent: Sent) -> list[np.ndarray]:
    """The outputs for each image. Raises Refused, naming the image, if one does not decode."""

    async def predict(place: int, image: bytes) -> np.ndarray:
        try:
            return await batcher.predict(image, client)
        except UserError as e:
            which = f"image {place + 1} of {len(sent.images)}, {printable(sent.names[place][:100])!r}: "
            raise Refused(422, f"{which if len(sent.images) > 1 else ''}{e}") from e

    if len(sent.images) == 1:
        return [await predict(0, sent.images[0])]
    tasks = [asyncio.create_task(predict(*one)) for one in enumerate(sent.images)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class _OwnPagesOnly:
    """Refuses requests for other hosts, and from pages of origins that are not allowed."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], cors: Sequence[str]) -> None:
        self._app, self._cors = app, {origin.lower() for origin in cors}
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refuse(Headers(scope=scope), scope["http_version"])):
            await _refusal(refused)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refuse(self, headers: Headers, version: str) -> Refused | None:
        hosts = headers.getlist("host")
        if len(hosts) > 1 or (not hosts and version == "1.1"):  # RFC 9112, section 3.2
            return Refused(400, f"the request has {len(hosts)} Host headers; send one")
        host = hosts[0].lower() if hosts else ""
        if "*" not in self._hosts and re.sub(r":[0-9]*$", "", host) not in self._hosts:
            return Refused(
                400, f"Host {printable(host[:100])}: this server answers only as {', '.join(sorted(self._hosts))}"
            )
        for origin in map(str.lower, headers.getlist("origin")):
            if origin.partition("://")[2] != host and not {"*", origin} & self._cors:
                return Refused(403, "a page of another site sent this request; only this server's own page may, unless "
                                    "the server is started with --cors")  # fmt: skip
        return None


def _parameters(request: Request, *allowed: str) -> Mapping[str, str]:
    """Returns the parameters in the URL. Raises Refused for unknown and for repeated ones."""
    given = request.query_params.multi_items()
    for name, _ in given:
        if name not in allowed:
            raise Refused(400, unknown("parameter", name[:100], allowed))
    if len({name.replace("_", "") for name, _ in given}) < len(given):
        raise Refused(400, f"give each parameter once: {', '.join(name for name, _ in given[:10])}")
    return dict(given)


def _top_k(given: Mapping[str, str], classes: int) -> int:
    for name, text in given.items():
        if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
            raise Refused(400, f"{name}={printable(text[:20])}: must be a whole number from 1 to 999999999")
        return min(int(text), classes)
    return min(5, classes)


def _json(value: JsonObject) -> Response:
    return JSONResponse(value, headers=_HEADERS)


def _refusal(refused: Refused, more: Mapping[str, str] | None = None) -> Response:
    headers = _HEADERS | dict(more or {})
    if refused.status in (403, 408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    if refused.status == 503:
        headers["Retry-After"] = "1"
    return JSONResponse({"error": refused.message}, refused.status, headers)


def _file(name: str, kind: str, title: str = "") -> Callable[[Request], Awaitable[Response]]:
    """Returns a handler that sends a file of this package, with `title` in place of TITLE."""
    content = resources.files("imgclf_jax.tools.serve").joinpath(name).read_text(encoding="utf-8")
    content = content.replace("TITLE", escape(printable(title)))

    async def send(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return send
