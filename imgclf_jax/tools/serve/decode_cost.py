"""Estimates what an image costs to decode, by its bytes and header: a small file can take minutes."""

import io
import re

from PIL import Image

from imgclf_jax.core.errors import UserError
from imgclf_jax.data.decode import FORMATS

# Progressive JPEG images have about 10 scans, and libjpeg-turbo advises refusing more than 500. Each scan covers all
# pixels, so large images may have fewer: 16 at 8192 by 8192 pixels, some 4 seconds.
MAX_SCANS = 500
MAX_WORK = 2**30  # pixels times scans
_MAX_SEGMENTS = 2**16  # of a JPEG image, which has some hundred; each takes Python a microsecond
_MAX_IN_PYTHON = 2**24  # values of a PPM image that Pillow decodes in Python, some 4 seconds
_MAX_PROFILES = 16  # of a PNG image, which has one; each may unpack to a megabyte
_MAX_COMMENTS = 1000  # of a PPM image; Pillow copies the rest of the file for each
_THIN = 64  # the ratio of sides beyond which an image counts as larger, since an op may enlarge it

# A JPEG marker that begins a segment or ends the image: no stuffed byte, restart marker or reserved one, as in libjpeg.
_MARKER = re.compile(rb"\xff[^\x00-\xbf\xd0-\xd8\xff]")
_SOS, _EOI = b"\xff\xda", b"\xff\xd9"


class Costly(UserError):
    """An image that costs more than the limits of `check`."""


def check(data: bytes, max_work: float, max_bytes: float) -> None:
    """Raises Costly for an image of more than `max_work`, pixels times scans, or of more than `max_bytes`.

    Raises UserError if decoding would take far longer than usual for an image of its size. Images that Pillow cannot
    identify pass: `decode` says what is wrong with them.
    """
    if len(data) > max_bytes:
        raise Costly(f"the image has more than {max_bytes:,} bytes")
    if (work := work_of(data)) > max_work:
        raise Costly(f"the image takes work {work:,}, more than {max_work:,}")


def work_of(data: bytes) -> int:
    """Pixels times scans; 0 for bytes that Pillow cannot identify. Raises UserError as `check` does."""
    if data.startswith(b"\x89PNG") and data.count(b"iCCP") > _MAX_PROFILES:
        raise UserError(f"the image has more than {_MAX_PROFILES} color profiles; save it again with one")
    if data[:2] in (b"P1", b"P2", b"P3") and data.count(b"#") > _MAX_COMMENTS:
        raise UserError(f"the image has more than {_MAX_COMMENTS:,} comments; save it again without")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # Pillow's plugins raise many types for damaged bytes
        return 0
    pixels, scans = picture.width * picture.height, 1
    if picture.format in ("JPEG", "MPO"):
        scans = max(1, _count_scans(data))
        if scans > MAX_SCANS or scans * pixels > MAX_WORK:
            most = min(MAX_SCANS, MAX_WORK // pixels)
            raise UserError(f"the JPEG image has {scans:,} scans, but one of {pixels:,} pixels may have {most}; save "
                            "it again, for example without 'progressive'")  # fmt: skip
    elif picture.format == "PPM" and any(tile[0] != "raw" for tile in getattr(picture, "tile", ())):
        values = pixels * len(picture.getbands())
        if values > _MAX_IN_PYTHON:
            raise UserError(f"the PPM image has {values:,} values in a form that is slow to read; save it as PNG")
    return scans * max(pixels, max(picture.size) ** 2 // _THIN)


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
