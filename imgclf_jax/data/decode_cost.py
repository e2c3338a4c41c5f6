"""Limits on the cost of decoding an image, by its bytes and header: a small file can take minutes or a gigabyte."""

import contextlib
import re
import threading
from collections.abc import Iterator

from PIL import Image

from imgclf_jax.core import memory
from imgclf_jax.core.errors import UserError

# Progressive JPEG images have about 10 scans, and libjpeg-turbo advises refusing more than 500. Each scan covers all
# pixels, so large images may have fewer: 16 at 8192 by 8192 pixels, some 4 seconds.
MOST_SCANS = 500
MOST_WORK = 2**30  # pixels times scans
_MAX_SEGMENTS = 2**16  # of a JPEG image, which has some hundred; each takes Python a microsecond
_MAX_IN_PYTHON = 2**24  # values of a PPM image that Pillow decodes in Python, some 4 seconds
_MAX_PROFILES = 16  # of a PNG image, which has one; each may unpack to a megabyte
_MAX_COMMENTS = 1000  # of a PPM image; Pillow copies the rest of the file for each

# A JPEG marker that begins a segment or ends the image: no stuffed byte, restart marker or reserved one, as in libjpeg.
_MARKER = re.compile(rb"\xff[^\x00-\xbf\xd0-\xd8\xff]")
_SOS, _EOI = b"\xff\xda", b"\xff\xd9"

# Pixels of a WebP or AVIF image: the decoders and Pillow hold up to five copies with four channels.
MOST_COPIED = 2**25
_COPIED = ("WEBP", "AVIF")
# Threads decode images of up to 2**23 pixels freely, and at most 2**26 pixels of larger ones at a time: otherwise each
# thread could take a gigabyte. WebP and AVIF count twice.
_LARGE = 2**23
_MAX_DECODING = 2**26


class Costly(UserError):
    """An image that costs more than the limit of `at_most`."""


_limit = threading.local()
_released = threading.Condition()
_decoding = 0  # pixels of large images in the decoders; guarded by `_released`


@contextlib.contextmanager
def at_most(work: int, length: int) -> Iterator[None]:
    """Raises Costly, in this thread, before decoding an image of more than `work` (see `check`) or resizing it to more.

    Also before reading more than `length` bytes, since a header may have any length.
    """
    before = getattr(_limit, "now", None)
    _limit.now = work, length
    try:
        yield
    finally:
        _limit.now = before


@contextlib.contextmanager
def memory_slot(picture: Image.Image) -> Iterator[None]:
    """Makes a large image wait until those being decoded leave it enough memory."""
    global _decoding
    pixels = picture.width * picture.height * (2 if picture.format in _COPIED else 1)
    if pixels <= _LARGE:
        yield
        return
    pixels = min(pixels, _MAX_DECODING)
    with _released:
        _released.wait_for(lambda: _decoding + pixels <= _MAX_DECODING)
        _decoding += pixels
    memory.trim()  # fragments of earlier images would not be reused
    try:
        yield
    finally:
        with _released:
            _decoding -= pixels
            _released.notify_all()


def most_pixels(kind: str | None, usual: int) -> int:
    """The most pixels that an image of a format may have, given the `usual` limit of most formats."""
    return min(usual, MOST_COPIED) if kind in _COPIED else usual


def check_bytes(data: bytes) -> None:
    """Raises UserError for an image whose header alone would take seconds to read."""
    if (limit := getattr(_limit, "now", None)) and len(data) > limit[1]:
        raise Costly(f"the image has more than {limit[1]:,} bytes")
    if data.startswith(b"\x89PNG") and data.count(b"iCCP") > _MAX_PROFILES:
        raise UserError(f"the image has more than {_MAX_PROFILES} color profiles; save it again with one")
    if data[:2] in (b"P1", b"P2", b"P3") and data.count(b"#") > _MAX_COMMENTS:
        raise UserError(f"the image has more than {_MAX_COMMENTS:,} comments; save it again without")


def check(data: bytes, picture: Image.Image) -> None:
    """Raises UserError if decoding would take far longer than usual for an image of this size.

    `picture` is opened by Pillow but not yet decoded. The work is pixels times scans.
    """
    pixels, scans = picture.width * picture.height, 1
    if picture.format in ("JPEG", "MPO"):
        scans = max(1, _count_scans(data))
        if scans > MOST_SCANS or scans * pixels > MOST_WORK:
            most = min(MOST_SCANS, MOST_WORK // pixels)
            raise UserError(f"the JPEG image has {scans:,} scans, but one of {pixels:,} pixels may have {most}; save "
                            "it again, for example without 'progressive'")  # fmt: skip
    elif picture.format == "PPM" and any(tile[0] != "raw" for tile in getattr(picture, "tile", ())):
        values = pixels * len(picture.getbands())
        if values > _MAX_IN_PYTHON:
            raise UserError(f"the PPM image has {values:,} values in a form that is slow to read; save it as PNG")
    check_pixels(scans * pixels)


def _count_scans(data: bytes) -> int:
    """The number of scans of a JPEG image, or of the first image of MPO, which alone is decoded.

    Segments are skipped by their lengths, since a thumbnail or a comment may contain any marker. Whatever follows the
    image, such as the video of a phone's photograph, is not read.
    """
    scans, position = 0, 2
    for _ in range(_MAX_SEGMENTS):
        marker = _MARKER.search(data, position)
        if not marker or marker[0] == _EOI:
            return scans
        scans += marker[0] == _SOS
        length = int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        position = marker.end() + max(2, length)
    raise UserError(f"the JPEG image has more than {_MAX_SEGMENTS:,} segments; save it again")


def check_pixels(pixels: int) -> None:
    """Raises Costly inside `at_most` if an op creates more pixels than its limit, for example from a thin image."""
    if (limit := getattr(_limit, "now", None)) and pixels > limit[0]:
        raise Costly(f"the image takes more work than {limit[0]:,}")
