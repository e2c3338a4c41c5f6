"""Host ops: encoded bytes to a fixed-shape uint8 image, one image at a time.

An op maps an image, uint8[h, w, c], to another one. Random ops are declared as such (see `core.kinds`) and take a NumPy
generator before the image. Pillow decodes and resizes in training, evaluation and prediction alike. The ops that change
an image's size are in `resizing` and `tf_image`.
"""

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from imgclf_jax.core import kinds, paths, rng, spec
from imgclf_jax.core.errors import UserError, reason, unknown
from imgclf_jax.core.typing import Value
from imgclf_jax.data import pictures, tf_image
from imgclf_jax.data.pictures import Picture
from imgclf_jax.data.resizing import central_crop, random_resized_crop, resize, resize_small

# The formats of photographs and data sets. Pillow tries some of its forty others on any bytes; EPS runs Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")
_MAX_BYTES = 8 * pictures.MAX_PIXELS  # of a file: four uncompressed channels of 16 bits
_TILE = (322, 323)  # TIFF tags of a tile's width and height
_MAX_TILE = 2**24  # pixels; usual tiles have 2**16
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


def decode(
    image: bytes | np.ndarray | Image.Image, channels: int = 3, formats: tuple[str, ...] = FORMATS, draft: int = 0
) -> np.ndarray:
    """Decodes bytes, uint8[h, w, c] or a Pillow image to uint8[h, w, channels].

    - `channels` is 1, 3 or 4.
    - `formats` are Pillow's names of the formats to try; some others would run programs.
    - `draft` decodes a JPEG image at the smallest of 1/2, 1/4 and 1/8 of its size whose sides have at least `draft`
      pixels. That is faster, and gives other pixels.

    It applies the EXIF orientation, takes the first frame of an animation, drops alpha unless channels is 4, keeps the
    high byte of 16-bit grey, and converts color to grey by ITU-R 601 luma. Raises UserError for bytes that do not
    decode, and for an image of more than 2**26 pixels, or 2**20 in a row or column.
    """
    return pictures.to_array(_decode(image, channels, formats, draft))


def _decode(image: bytes | Picture, channels: int = 3, formats: tuple[str, ...] = FORMATS, draft: int = 0) -> Picture:
    """`decode` for the ops of this package, which take a Pillow image."""
    if channels not in _MODES:
        raise UserError(f"decode(channels={channels}): allowed are 1, 3 and 4")
    if type(draft) is not int or draft < 0:
        raise UserError(f"decode(draft={draft!r}): must be a number of pixels, or 0 for full size")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or not 1 <= image.shape[-1] <= 4:
            raise UserError(
                f"the image is {image.dtype}{list(image.shape)}; expected uint8[h, w, c] with c from 1 to 4"
            )
        if image.shape[-1] == channels:
            return image
        picture = pictures.to_pillow(image)
    elif isinstance(image, Image.Image):
        picture = _upright(image)
    else:
        picture = _load(_open(image, formats), draft)
    return _convert(picture, channels)


def _convert(picture: Image.Image, channels: int) -> Image.Image:
    """Converts a Pillow image to one with this number of channels of 8 bits."""
    if picture.mode.startswith("I"):  # 16 bits per pixel, which convert("L") would clip instead of scale
        deep = pictures.to_array(picture)[..., 0]
        if deep.dtype.itemsize > 2 and (deep.min() < 0 or deep.max() > 65535):
            raise UserError("the image has more than 16 bits per channel; save it with 8 or 16")
        picture = Image.fromarray((deep >> 8).astype(np.uint8))
    elif picture.mode == "F":
        raise UserError("the image holds floating-point values of unknown range; save it with 8 or 16 bits per channel")
    if picture.mode == "P":  # a palette may hold color and alpha
        picture = picture.convert("RGBA")
    elif picture.mode == "LAB":  # which Pillow cannot convert to grey directly
        picture = picture.convert("RGB")
    if picture.mode != _MODES[channels]:
        picture = picture.convert(_MODES[channels])
    return picture


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Opens an image by its header and checks that it may be decoded."""
    if formats != FORMATS:
        formats = _check_formats(formats)
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=formats)
        _check_size(picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:  # Pillow's limits are above ours
        raise UserError(f"the image has more than {pictures.MAX_PIXELS:,} pixels; make it smaller") from e
    except UserError:
        raise
    except Exception as e:  # Pillow's plugins raise many types for damaged bytes
        if "cannot identify" in str(e):
            raise UserError(f"the image is in none of the formats {', '.join(formats)}; convert it to one") from e
        raise _undecodable(e) from e
    return picture


def _load(picture: Image.Image, draft: int) -> Image.Image:
    try:
        if draft:
            picture.draft(None, (draft, draft))  # affects only JPEG
        upright = _upright(picture)
    except UserError:
        raise
    except Exception as e:
        raise _undecodable(e) from e
    if upright is not picture:
        picture.close()  # frees its pixels
    return upright


def _upright(picture: Image.Image) -> Image.Image:
    """Applies the EXIF orientation. `ImageOps.exif_transpose` also rewrites the EXIF, and fails on odd values."""
    picture.load()  # which turns TIFF images, and forgets their orientation
    turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    return picture if turn is None else picture.transpose(turn)


def _undecodable(error: Exception) -> UserError:
    return UserError(f"the image does not decode: {reason(error)}")


def _check_size(picture: Image.Image) -> None:
    """Raises UserError if an image is too large to decode, by its header."""
    pictures.check_pixels("the image", picture.height, picture.width)
    tags = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    tile = [size for tag in _TILE if isinstance(size := tags.get(tag), int)]
    if math.prod(tile) > _MAX_TILE:  # libtiff allocates a whole tile, however small the image
        raise UserError(f"the image has tiles of {' by '.join(f'{size:,}' for size in tile)} pixels; save it again "
                        "without tiles")  # fmt: skip


def check_header(data: bytes, formats: tuple[str, ...] = FORMATS) -> None:
    """Raises UserError if the bytes do not begin as an image in one of the formats, or one that is too large."""
    _open(data, formats)


def formats_of(preprocess: str) -> tuple[str, ...]:
    """The image formats that a spec of host ops reads, by its first op `decode`."""
    calls = spec.parse(preprocess)
    if not calls or calls[0].name != "decode":
        return FORMATS
    return _check_formats(_bind(calls[0]).keywords.get("formats", FORMATS))


def _check_formats(formats: Value) -> tuple[str, ...]:
    """The names of formats in capitals. Raises UserError if Pillow does not know one."""
    Image.init()
    if not isinstance(formats, (tuple, list)) or not formats or not all(isinstance(name, str) for name in formats):
        raise UserError(f"decode(formats={formats!r}): must be a tuple of names, such as ('JPEG', 'PNG')")
    names = tuple(name.upper() for name in formats)
    for name in names:
        if name not in Image.OPEN:
            raise UserError(unknown("image format", name, Image.OPEN))
        if name == "EPS":  # an untrusted config may name formats, but must not run code
            raise UserError("decode: an EPS image is a program that Ghostscript runs; convert it to PNG yourself")
    return names


def read_file(path: Path) -> bytes:
    """Reads an image file. Raises OSError, and UserError for a file longer than any image."""
    if (length := path.stat().st_size) > _MAX_BYTES:
        raise UserError(f"the file has {length:,} bytes, but an image may have {_MAX_BYTES:,}; make it smaller")
    return paths.read(path)


HOST_OPS: dict[str, Callable] = {
    "decode": decode,
    "resize": resize,
    "resize_small": resize_small,
    "central_crop": central_crop,
    "random_resized_crop": random_resized_crop,
    "inception_crop": tf_image.inception_crop,
}

# Those that take a Pillow image too, and then may return one.
_PICTURE_OPS = (_decode, resize, resize_small, central_crop, random_resized_crop, tf_image.inception_crop)

type Undecoded = bytes | Picture
type HostOps = Callable[[Undecoded, int, int], np.ndarray]

_LEADING = {kinds.PLAIN: ("image",), kinds.RANDOM: ("rng", "image")}


def _bind(call: spec.Call) -> functools.partial[Any]:
    return kinds.bind(call, HOST_OPS, "host op", _LEADING)


def _bind_all(calls: list[spec.Call], where: str) -> list[functools.partial[Any]]:
    """Binds host ops. Raises UserError, naming `where`, unless the first is `decode` with allowed channels."""
    if not calls or calls[0].name != "decode":
        raise UserError(f"{where}: the first op must be decode(channels)")
    ops = [_bind(call) for call in calls]
    if (channels := ops[0].keywords.get("channels", 3)) not in list(_MODES):
        raise UserError(f"{where}: decode(channels={channels!r}): allowed are 1, 3 and 4")
    return ops


def build(text: str) -> tuple[HostOps, bool]:
    """Returns the function (image, seed, position) → uint8[h, w, c] of a spec of host ops, and whether it is random.

    `position` is the example's global position in the stream. An op's draws depend on the seed, the position, its name
    and the number of earlier ops of that name, so adding another op does not change them.
    """
    calls = spec.parse(text)
    ops = _bind_all(calls, f"preprocess={text!r}")
    ops[0] = functools.partial(_decode, *ops[0].args, **ops[0].keywords)
    streams = [f"preprocess/{call.name}/{i}" for call, i in zip(calls, spec.occurrences(calls), strict=True)]
    is_random = [kinds.kind_of(op) == kinds.RANDOM for op in ops]

    def apply(undecoded: Undecoded, seed: int, position: int) -> np.ndarray:
        image: Any = undecoded
        try:
            for call, op, random, stream in zip(calls, ops, is_random, streams, strict=True):
                image = image if op.func in _PICTURE_OPS else _read_only(pictures.to_array(image))
                image = op(rng.generator(seed, stream, position), image) if random else op(image)
                pictures.check_pixels(f"the image after {call.name}", *pictures.size_of(image))
        except MemoryError as e:
            raise UserError(f"{call.name} runs out of memory; make the image smaller") from e
        except ValueError as e:
            if isinstance(e, UserError) or "read-only" not in str(e):
                raise
            raise UserError(f"{call.name} writes to a read-only array; an op must not change its image, so return a "
                            "new array, for example by changing image.copy()") from e  # fmt: skip
        return np.asarray(pictures.to_array(image))

    return apply, any(is_random)


def _read_only(image: np.ndarray) -> np.ndarray:
    """A view that an op cannot change; the array may be the source's own."""
    view = np.asarray(image).view()
    view.flags.writeable = False
    return view


def only_decodes(preprocess: str) -> bool:
    """Whether a spec of host ops is `decode` alone."""
    return len(spec.parse(preprocess)) == 1


def decoder(preprocess: str) -> Callable[[bytes], np.ndarray]:
    """The first host op of a spec, `decode`, with its arguments bound."""
    op = _bind(spec.parse(preprocess)[0])
    return lambda data: np.asarray(op(data))


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
    explicit = bool(preprocess_eval.strip())
    key, text = ("preprocess_eval", preprocess_eval) if explicit else ("preprocess", preprocess)
    calls = spec.parse(text)
    ops = _bind_all(calls, f"{key}={text!r}")
    if all(kinds.kind_of(op) == kinds.PLAIN for op in ops):
        return text
    replaced: list[spec.Call] = []
    for call, op in zip(calls, ops, strict=True):
        if kinds.kind_of(op) == kinds.PLAIN:
            replaced.append(call)
            continue
        replacement = _resized_centre(**op.keywords) if call.name == "random_resized_crop" else []
        if explicit or not replacement:
            words = "|".join(map(str, replacement))
            fix = f"write {words} instead" if replacement else "set preprocess_eval to deterministic host ops"
            raise UserError(f"{key}={text!r}: {call.name} is random, but evaluation must be deterministic; {fix}")
        replaced += replacement
    return "|".join(map(str, replaced))
