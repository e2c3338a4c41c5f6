"""Host ops: encoded bytes to a fixed-shape uint8 image, one image at a time.

An op maps an image, uint8[h, w, c], to another one. Random ops are declared as such (see `core.kinds`) and take a NumPy
generator first. Pillow decodes in training, evaluation and prediction alike. `resizing` has the ops that change sizes.
"""

import functools
import importlib.util
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from imgclf_jax.core import kinds, paths, rng, spec
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.data import resizing
from imgclf_jax.data.resizing import Picture

# The formats of photographs and data sets. Pillow tries some of its forty others on any bytes; EPS runs Ghostscript.
FORMATS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF"]
if importlib.util.find_spec("pillow_heif"):  # HEIC, of phones
    importlib.import_module("pillow_heif").register_heif_opener()
    FORMATS.append("HEIF")
_MAX_BYTES = 8 * resizing.MAX_PIXELS  # of a file: four uncompressed channels of 16 bits
_TILE = (322, 323)  # TIFF tags of a tile's width and height
_MAX_TILE = 2**24  # pixels; usual tiles have 2**16
type Undecoded = bytes | Picture

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(image: Undecoded, channels: int = 3, draft: int = 0) -> np.ndarray:
    """Decodes bytes, uint8[h, w, c] or a Pillow image to uint8[h, w, channels].

    `channels` is 1, 3 or 4. `draft` decodes a JPEG image at the smallest of 1/2, 1/4 and 1/8 of its size whose sides
    have at least `draft` pixels, which is faster and gives other pixels.

    It applies the EXIF orientation, takes the first frame of an animation, drops alpha unless channels is 4, converts
    color to grey by ITU-R 601 luma, and keeps the high byte of 16 bits per channel, or in grey of the `bits` of the
    data set. Raises UserError for bytes that do not decode, and for an image of more than 2**26 pixels, or 2**20 in a
    row or column.
    """
    return resizing.to_array(_decode(image, channels, draft))


def measure(data: bytes) -> int:
    """Decodes an image. Returns the bits of its greatest value if it is grey of more than 8 bits, else 0."""
    decode(data, draft=1)  # twice as fast for JPEG, and reads the whole file too
    picture = _open(data)
    if picture.mode.startswith("I"):
        return int(np.asarray(picture).max()).bit_length()
    if ";16" in str(getattr(picture, "tile", "")) and np.asarray(picture).max() < 16:  # Pillow drops the low bytes
        raise UserError("the image has 16 bits per channel and color, and no value above 4095: it would be black, as "
                        "only the high bytes are read; save it with 8 bits")  # fmt: skip
    return 0


def _decode(image: Undecoded, channels: int = 3, draft: int = 0, bits: int = 16) -> Picture:
    """`decode` for the ops of `resizing`, which take a Pillow image. `bits` are those of grey with more than 8."""
    if channels not in _MODES:
        raise UserError(f"decode(channels={channels!r}): allowed are 1, 3 and 4")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or not 1 <= image.shape[-1] <= 4:
            raise UserError(f"the image is {image.dtype}{list(image.shape)}; expected uint8[h, w, c] with c 1 to 4")
        if image.shape[-1] == channels:
            return image
        return _convert(resizing.to_pillow(image), channels, bits)
    try:
        picture = image if isinstance(image, Image.Image) else _open(image)
        if draft:
            picture.draft(None, (draft, draft))  # affects only JPEG
        return _convert(_upright(picture), channels, bits)
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:  # Pillow's limits are above ours
        raise UserError(f"the image has more than {resizing.MAX_PIXELS:,} pixels; make it smaller") from e
    except UnidentifiedImageError as e:
        more = "" if "HEIF" in FORMATS else ", or install pillow-heif if it is HEIC"
        raise UserError(f"the image is in none of the formats {', '.join(FORMATS)}; convert it to one{more}") from e
    except Exception as e:  # Pillow's plugins raise many types for damaged bytes
        raise UserError(f"the image does not decode: {reason(e)}") from e


def _open(data: bytes) -> Image.Image:
    """Opens an image by its header. Raises UserError if it is too large to decode."""
    picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    resizing.check_pixels("the image", picture.height, picture.width)
    tags = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    tile = [size for tag in _TILE if isinstance(size := tags.get(tag), int)]
    if math.prod(tile) > _MAX_TILE:  # libtiff allocates a whole tile, however small the image
        raise UserError(f"the image has tiles of {' by '.join(f'{size:,}' for size in tile)} pixels; save it again "
                        "without tiles")  # fmt: skip
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    """Applies the EXIF orientation. `ImageOps.exif_transpose` also rewrites the EXIF, and fails on odd values."""
    picture.load()  # which turns TIFF images, and forgets their orientation
    turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    return picture if turn is None else picture.transpose(turn)


def _convert(picture: Image.Image, channels: int, bits: int) -> Image.Image:
    """Converts a Pillow image to one with this number of channels of 8 bits, the high ones of `bits` of deep grey."""
    if picture.mode.startswith("I"):  # more than 8 bits, which convert("L") would clip instead of scale
        deep = np.asarray(picture).astype(np.int64)
        if deep.min() < 0 or deep.max() >> bits:
            raise UserError(f"the image has more than {bits} bits per channel: its values are from {deep.min()} to "
                            f"{deep.max()}; save it with 8, or as the training images")  # fmt: skip
        picture = Image.fromarray((deep << 8 >> bits).astype(np.uint8))
    elif picture.mode == "F":
        raise UserError("the image holds floating-point values of unknown range; save it with 8 or 16 bits per channel")
    if picture.mode == "P":  # a palette may hold color and alpha
        picture = picture.convert("RGBA")
    elif picture.mode == "LAB":  # which Pillow cannot convert to grey directly
        picture = picture.convert("RGB")
    return picture if picture.mode == _MODES[channels] else picture.convert(_MODES[channels])


def read_file(path: Path) -> bytes:
    """Reads an image file. Raises OSError, and UserError for a file longer than any image."""
    if (length := path.stat().st_size) > _MAX_BYTES:
        raise UserError(f"the file has {length:,} bytes, but an image may have {_MAX_BYTES:,}; make it smaller")
    return paths.read(path)


HOST_OPS: dict[str, Callable] = {
    f.__name__: f
    for f in (decode, resizing.resize, resizing.resize_small, resizing.central_crop, resizing.random_resized_crop,
              resizing.inception_crop)
}  # fmt: skip

_PICTURE_OPS = frozenset({_decode, *HOST_OPS.values()})  # they take a Pillow image too

type HostOps = Callable[[Undecoded, int, int], np.ndarray]

_LEADING = {kinds.PLAIN: ("image",), kinds.RANDOM: ("rng", "image")}


def _bind(text: str, where: str) -> tuple[list[spec.Call], list[functools.partial[Any]]]:
    """Binds host ops. Raises UserError, naming the key `where`, unless the first is `decode`."""
    calls = spec.parse(text)
    if not calls or calls[0].name != "decode":
        raise UserError(f"{where}={text!r}: the first op must be decode(channels)")
    return calls, [kinds.bind(call, HOST_OPS, "host op", _LEADING) for call in calls]


def build(text: str, bits: int = 16) -> tuple[HostOps, bool]:
    """Returns the function (image, seed, position) → uint8[h, w, c] of a spec of host ops, and whether it is random.

    `position` is the example's global position in the stream, `bits` those of the data set's grey images of more than 8
    (see `Source`). An op's draws depend on the seed, the position, its name and the number of earlier ops of that name,
    so adding another op does not change them. The function raises UserError for an image that an op of this package
    cannot process; an error in a user's op passes, for its traceback.
    """
    calls, ops = _bind(text, "preprocess")
    ops[0] = functools.partial(_decode, *ops[0].args, **ops[0].keywords | {"bits": bits})
    streams = [f"preprocess/{call.name}/{i}" for call, i in zip(calls, spec.occurrences(calls), strict=True)]
    is_random = [kinds.kind_of(op) == kinds.RANDOM for op in ops]

    def apply(image: Any, seed: int, position: int) -> np.ndarray:
        for op, random, stream, call in zip(ops, is_random, streams, calls, strict=True):
            image = image if op.func in _PICTURE_OPS else _read_only(image)
            try:
                image = op(rng.generator(seed, stream, position), image) if random else op(image)
            except (TypeError, ValueError, ArithmeticError) as e:
                if isinstance(e, UserError) or ":" in call.name:
                    raise
                raise UserError(f"preprocess={text!r} fails: {e}") from e
            if not isinstance(image, Image.Image) and np.ndim(image) < 2:
                raise UserError(f"preprocess={text!r}: {call.name} returns {image!r:.60}; return uint8[h, w, c]")
            resizing.check_pixels(f"the image after {call.name}", *resizing.size_of(image))
        return resizing.to_array(image)

    return apply, any(is_random)


def _read_only(image: Picture) -> np.ndarray:
    """A view that a user's op cannot change; the array may be the source's own."""
    view = resizing.to_array(image).view()
    view.flags.writeable = False
    return view


def _resized_centre(height: int, width: int = 0, method: str = "bilinear", **_: object) -> list[spec.Call]:
    """The counterpart of random_resized_crop: the central 7/8 of the shorter side, as in 224 of 256 pixels."""
    size = round(max(height, width) * 8 / 7)
    resized = spec.Call("resize_small", (size,), {} if method == "bilinear" else {"method": method})
    return [resized, spec.Call("central_crop", (height, width) if width else (height,))]


def evaluation_spec(preprocess_eval: str, preprocess: str) -> str:
    """The spec of deterministic host ops for evaluation: `preprocess_eval`, or `preprocess` if it is empty.

    Replaces a random op of `preprocess` by its counterpart, such as random_resized_crop(224) by
    resize_small(256)|central_crop(224). Raises UserError if there is none, and for a random `preprocess_eval`.
    """
    key, text = ("preprocess_eval", preprocess_eval) if preprocess_eval.strip() else ("preprocess", preprocess)
    calls, ops = _bind(text, key)
    if all(kinds.kind_of(op) == kinds.PLAIN for op in ops):
        return text
    replaced: list[spec.Call] = []
    for call, op in zip(calls, ops, strict=True):
        if kinds.kind_of(op) == kinds.PLAIN:
            replaced.append(call)
        elif call.name == "random_resized_crop" and key == "preprocess":
            replaced += _resized_centre(**op.keywords)
        else:
            raise UserError(f"{key}={text!r}: {call.name} is random, but evaluation must be deterministic; set "
                            "preprocess_eval to deterministic host ops")  # fmt: skip
    return "|".join(map(str, replaced))
