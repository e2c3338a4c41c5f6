"""What decoding an image costs, from its bytes and header: small files can take minutes, or a gigabyte each."""

import contextlib
import threading
from collections.abc import Iterator

from PIL import Image

from imgclf_jax.core import memory
from imgclf_jax.core.errors import UserError

# Progressive JPEG images have about 10 scans, and libjpeg-turbo advises to refuse more than 500. Each of them goes
# through all pixels, so that large images may have fewer: 16 at 8192 by 8192 pixels, some 4 seconds.
MOST_SCANS = 500
MOST_WORK = 2**30  # pixels, times the scans
_MOST_IN_PYTHON = 2**24  # numbers of a PPM image that Pillow decodes in Python, some 4 seconds
_MOST_PROFILES = 16  # of a PNG image, which has one; each may unpack to a megabyte
_MOST_COMMENTS = 1000  # of a PPM image; Pillow moves all that follows for each of them

# Pixels of a WebP or AVIF image: the decoders and Pillow hold up to five copies with four channels.
MOST_COPIED = 2**25
_COPIED = ("WEBP", "AVIF")
# Threads decode images of up to 2**23 pixels as they come. Of larger ones they decode at most 2**26 pixels at once, or
# a thread for each processor could take a gigabyte. WebP and AVIF count twice.
_LARGE = 2**23
_AT_ONCE = 2**26


class Costly(UserError):
    """An image that costs more than the limit of `at_most`."""


_limit = threading.local()
_ended = threading.Condition()
_large = 0  # pixels of large images that are being decoded; guarded by `_ended`


@contextlib.contextmanager
def at_most(work: int, length: int) -> Iterator[None]:
    """In this thread, inside: Costly is raised before anything is decoded that takes more than `work`, see `check`.

    So it is before anything is read of a file of more than `length` bytes, as a header may be of any length.
    """
    before = getattr(_limit, "now", None)
    _limit.now = work, length
    try:
        yield
    finally:
        _limit.now = before


@contextlib.contextmanager
def turn(picture: Image.Image) -> Iterator[None]:
    """Waits, for a large image, until others that are being decoded leave it room. Their memory adds up no further."""
    global _large
    pixels = picture.width * picture.height * (2 if picture.format in _COPIED else 1)
    if pixels <= _LARGE:
        yield
        return
    pixels = min(pixels, _AT_ONCE)
    with _ended:
        _ended.wait_for(lambda: _large + pixels <= _AT_ONCE)
        _large += pixels
    memory.give_back()  # what the images before it have left; pieces of it would not be used again
    try:
        yield
    finally:
        with _ended:
            _large -= pixels
            _ended.notify_all()


def most_pixels(kind: str | None, usual: int) -> int:
    """The most pixels that an image of a format may have, where those of most formats may have `usual`."""
    return min(usual, MOST_COPIED) if kind in _COPIED else usual


def check_bytes(data: bytes) -> None:
    """Raises UserError for the bytes of an image whose header alone would take seconds to read."""
    if (limit := getattr(_limit, "now", None)) and len(data) > limit[1]:
        raise Costly(f"the image has more than {limit[1]:,} bytes")
    if data.startswith(b"\x89PNG") and data.count(b"iCCP") > _MOST_PROFILES:
        raise UserError(f"the image has more than {_MOST_PROFILES} colour profiles; save it again with one")
    if data[:2] in (b"P1", b"P2", b"P3") and data.count(b"#") > _MOST_COMMENTS:
        raise UserError(f"the image has more than {_MOST_COMMENTS:,} comments; save it again without")


def check(data: bytes, picture: Image.Image) -> None:
    """Raises UserError where decoding would take far longer than an image of this size does.

    `picture` is what Pillow has opened, before it is decoded. The work is pixels times scans; a scan is a marker SOS,
    which no compressed data of a JPEG image hold.
    """
    pixels, scans = picture.width * picture.height, 1
    if picture.format in ("JPEG", "MPO"):
        scans = max(1, data.count(b"\xff\xda"))
        if scans > MOST_SCANS or scans * pixels > MOST_WORK:
            most = min(MOST_SCANS, MOST_WORK // pixels)
            raise UserError(f"the JPEG image has {scans:,} scans, and one of {pixels:,} pixels may have {most}; save "
                            "it again, such as without 'progressive'")  # fmt: skip
    elif picture.format == "PPM" and any(tile[0] != "raw" for tile in getattr(picture, "tile", ())):
        numbers = pixels * len(picture.getbands())
        if numbers > _MOST_IN_PYTHON:
            raise UserError(f"the PPM image has {numbers:,} numbers in a form that is slow to read; save it as PNG")
    if (limit := getattr(_limit, "now", None)) and scans * pixels > limit[0]:
        raise Costly(f"the image takes more work than {limit[0]:,}")
