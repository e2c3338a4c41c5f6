"""Reads the image files of a request: the raw body, parts of multipart/form-data, or base64 in JSON."""

import asyncio
import binascii
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from imgclf_jax.core.text import printable
from imgclf_jax.tools.serve.limits import Limits, Refused, Share

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # or clients could fill the log

_SLICE = 2**20  # characters of base64, a few milliseconds to decode
_WANTED = 'send {"image": "<base64>"}, or {"images": ["<base64>", ...]}'


@dataclass(frozen=True)
class Sent:
    """The image files of a request, their names in messages, and whether the answer is a list even for one."""

    images: list[bytes]
    names: list[str]
    listed: bool = False


class Bodies:
    """Reads the bodies of requests. Small bodies together take bounded memory, and so do large ones."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._small, self._large = Share(limits.small_bodies_bytes), Share(limits.large_bodies_bytes)
        self._parsing = asyncio.Lock()  # 20 MB of JSON take 60 MB while they are parsed

    @contextlib.asynccontextmanager
    async def read(self, request: Request, client: str) -> AsyncIterator[Sent]:
        """Yields the images of a request. Raises Refused as soon as it is too long or slow, or memory runs out."""
        limits, size, share = self._limits, 0, self._small
        too_long = Refused(413, f"the body is longer than {limits.body_bytes:,} bytes; send a smaller image")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > limits.body_bytes):
            raise too_long
        form = _form(request.headers.get("content-type", ""), limits.images)
        try:
            try:
                async with asyncio.timeout(limits.body_seconds):
                    async for part in request.stream():
                        total = size + len(part)
                        if total > limits.body_bytes:
                            raise too_long
                        grows = share is self._small and total > limits.small_body_bytes
                        wanted, more = (self._large, total) if grows else (share, len(part))
                        if not wanted.take(client, more):
                            raise Refused(503, "too many bytes of images at once; try again in a second")
                        if grows:
                            share.give_back(client, size)
                        size, share = total, wanted
                        form.write(part)
            except TimeoutError:
                raise Refused(408, f"the body did not arrive within {limits.body_seconds:g} s") from None
            if not size:
                raise Refused(400, "the body is empty; send the bytes of an image file")
            if share is self._small:
                sent = form.finish()
            else:
                async with self._parsing:
                    sent = await asyncio.to_thread(form.finish)
            del form, part
            yield sent
        finally:
            share.give_back(client, size)


def _form(content_type: str, most: int) -> "_Multipart | _Whole":
    """Returns what collects a body of up to `most` images, part by part. It raises Refused, with status 400 or 413."""
    if content_type[:9].lower() == "multipart":
        return _Multipart(content_type, most)
    return _Whole(content_type[:16].lower() == "application/json", most)


class _Whole:
    """An image file or JSON. curl declares any body a form, so a first byte of `{` means JSON, too."""

    def __init__(self, is_json: bool, most: int) -> None:
        self._parts: list[bytes] = []
        self._is_json, self._most = is_json, most

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def finish(self) -> Sent:
        body = b"".join(self._parts)
        self._parts.clear()
        return _from_json(body, self._most) if self._is_json or body[:1] == b"{" else Sent([body], [""])


def _from_json(body: bytes, most: int) -> Sent:
    # As Python objects, 20 MB of brackets take a gigabyte. Base64 has none of these, and a data URL one comma.
    if len(body) - len(body.translate(None, b"[{,")) > 2 * most + 8:
        raise Refused(413, f"the JSON holds more than {most} values; {_WANTED}, of at most {most} images")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"the body is not JSON ({printable(str(e))}); {_WANTED}") from None
    if not isinstance(found, dict) or found.keys() not in ({"image"}, {"images"}):
        raise Refused(400, f"the JSON is not what this server reads; {_WANTED}")
    [(key, value)] = found.items()
    listed = key == "images"
    texts = value if listed and isinstance(value, list) else [value]
    if not texts:
        raise Refused(400, f"there are no images; {_WANTED}")
    if len(texts) > most:
        raise Refused(413, f"{len(texts)} images, and a request may have {most}; send several requests")
    names = [f"images[{i}]" for i in range(len(texts))] if listed else ["image"]
    return Sent([_decode(text, name) for text, name in zip(texts, names, strict=True)], names, listed)


def _decode(text: Any, name: str) -> bytes:
    with contextlib.suppress(ValueError):  # as binascii's and UnicodeEncodeError are
        if isinstance(text, str):
            start = re.match(r"data:[^,]{0,200};base64,", text)
            characters = text[start.end() if start else 0 :].encode("ascii").translate(None, b" \t\r\n")
            slices = range(0, len(characters), _SLICE)  # other threads run in between
            return b"".join(binascii.a2b_base64(characters[i : i + _SLICE], strict_mode=True) for i in slices)
    raise Refused(400, f"{name} is not base64 text; {_WANTED}")


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    """Inside, turns errors of the parser, such as for a long boundary, into Refused."""
    try:
        yield
    except FormParserError as e:
        raise Refused(400, f"the body is not multipart/form-data: {printable(str(e))}") from None


class _Multipart:
    """A form with an image file per part, named by its file name or its field."""

    def __init__(self, content_type: str, most: int) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise Refused(400, f"Content-Type {printable(content_type[:80])}: send multipart/form-data with a boundary")
        self._most, self._ended = most, False
        self._parts: list[bytearray] = []
        self._heads: list[list[bytearray]] = []  # of each part [name, value, name, value, …]
        with _parsing():
            self._parser = MultipartParser(options[b"boundary"], {
                "on_part_begin": self._begin_part,
                "on_part_data": lambda data, start, end: self._parts[-1].extend(data[start:end]),
                "on_header_begin": lambda: self._heads[-1].extend((bytearray(), bytearray())),
                "on_header_field": lambda data, start, end: self._heads[-1][-2].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._heads[-1][-1].extend(data[start:end]),
                "on_end": lambda: setattr(self, "_ended", True),
            })  # fmt: skip

    def _begin_part(self) -> None:
        if len(self._parts) == self._most:
            raise Refused(413, f"more than {self._most} images; send several requests")
        self._parts.append(bytearray())
        self._heads.append([])

    def write(self, data: bytes) -> None:
        with _parsing():
            self._parser.write(data)

    def finish(self) -> Sent:
        if not self._ended:
            raise Refused(400, "the multipart body ends before its last boundary")
        fields, names = [], []
        for head in self._heads:
            headers = {bytes(name).lower(): bytes(value) for name, value in zip(head[::2], head[1::2], strict=True)}
            _, options = parse_options_header(headers.get(b"content-disposition", b""))
            field, name = (options.get(key, b"").decode("utf-8", "replace") for key in (b"name", b"filename"))
            fields.append(field)
            names.append(name or field)
        if not names:
            raise Refused(400, "the form has no image")
        images = []
        while self._parts:  # one by one, so that at most one is in memory twice
            images.append(bytes(self._parts.pop(0)))
        return Sent(images, names, len(images) > 1 or fields == ["images"])
