"""Decodes the images of requests: small ones in several threads, and slow ones one at a time beside them."""

import asyncio
import io
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fastapi import HTTPException
from PIL import Image

from imgclf_jax.core import machine
from imgclf_jax.core.errors import UserError
from imgclf_jax.data.decode import FORMATS

_SMALL = 2**20  # pixels times scans, about 10 ms; larger images may take seconds and a gigabyte
_TINY_FILE, _TINY = 4096, 2**14  # bytes, and pixels times scans: a millisecond or two
_PACKED = re.compile(b"iCCP|iTXt|zTXt")  # chunks of a PNG image that may each unpack to a megabyte
_MAX_WAITING = 64  # slow images
# libjpeg-turbo advises refusing more than 500 scans. Each covers all pixels: 2**30 take 4 seconds.
_MAX_SCANS, _MAX_WORK = 500, 2**30
_MAX_SEGMENTS = 2**16  # of a JPEG image, which has some hundred
_MAX_PROFILES = 16  # of a PNG image, which has one; each may unpack to a megabyte
_THIN = 64  # the ratio of sides beyond which an image counts as larger, since an op may enlarge it

# A JPEG marker that begins a segment or ends the image: no stuffed byte, restart marker or reserved one, as in libjpeg.
_MARKER = re.compile(rb"\xff[^\x00-\xbf\xd0-\xd8\xff]")


class _Slow(UserError):
    """An image that is no small one."""


class Decoder:
    """Two queues of image files, so that small images never wait for slow ones. For use from one event loop."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(machine.processors(), "decode")
        self._slow = ThreadPoolExecutor(1, "decode-slow")
        self._waiting = 0

    async def decode[T](self, image: bytes, make: Callable[[bytes], T]) -> T:
        """Returns `make(image)`. Raises its UserError, one for an image built to be slow, or as `alone` does."""
        if len(image) <= _TINY_FILE and not _PACKED.search(image) and work_of(image) <= _TINY:  # not worth a thread
            return make(image)
        try:
            return await _call(self._small, image, make, _SMALL)
        except _Slow:
            return await self.alone(image, make)

    async def alone[T](self, image: bytes, make: Callable[[bytes], T]) -> T:
        """As `decode`, in the queue of slow images. Raises HTTPException 503 if too many wait there."""
        if self._waiting >= _MAX_WAITING:
            raise HTTPException(503, "too many large images wait; try again in a minute")
        self._waiting += 1
        try:
            return await _call(self._slow, image, make, math.inf)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Drops what waits, without waiting for what runs."""
        for pool in (self._small, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)


async def _call[T](pool: ThreadPoolExecutor, image: bytes, make: Callable[[bytes], T], max_work: float) -> T:
    made = await asyncio.get_running_loop().run_in_executor(pool, _attempt, image, make, max_work)
    if isinstance(made, UserError):
        raise type(made)(str(made))
    return made


def _attempt[T](image: bytes, make: Callable[[bytes], T], max_work: float) -> T | UserError:
    """Returns `make(image)` or its error without the traceback, whose frames hold up to hundreds of megabytes."""
    try:
        return _Slow() if work_of(image) > max_work else make(image)
    except UserError as e:
        return UserError(str(e))


def work_of(data: bytes) -> int:
    """Pixels times scans of an image file; 0 if Pillow cannot identify it, which `decode` explains.

    Raises UserError for an image that takes far longer than others of its size, such as a JPEG image of many scans.
    """
    if data[:2] in (b"P1", b"P2", b"P3"):
        raise UserError("the PPM image is text, which is slow to read; save it as PNG")
    if data.startswith(b"\x89PNG") and data.count(b"iCCP") > _MAX_PROFILES:
        raise UserError(f"the image has more than {_MAX_PROFILES} color profiles; save it again with one")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # Pillow's plugins raise many types for damaged bytes
        return 0
    pixels, scans = picture.width * picture.height, 1
    if picture.format in ("JPEG", "MPO"):
        scans = max(1, _count_scans(data))
        if scans > _MAX_SCANS or scans * pixels > _MAX_WORK:
            raise UserError(f"the JPEG image has {scans:,} scans; save it again, for example without 'progressive'")
    return scans * max(pixels, max(picture.size) ** 2 // _THIN)


def _count_scans(data: bytes) -> int:
    """The number of scans of a JPEG image, or of the first one of MPO.

    Segments are skipped by their lengths, since a thumbnail or a comment may contain any marker.
    """
    scans, position = 0, 2
    for _ in range(_MAX_SEGMENTS):
        marker = _MARKER.search(data, position)
        if not marker or marker[0] == b"\xff\xd9":  # the end of the image
            return scans
        scans += marker[0] == b"\xff\xda"  # the start of a scan
        position = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    raise UserError(f"the JPEG image has more than {_MAX_SEGMENTS:,} segments; save it again")
