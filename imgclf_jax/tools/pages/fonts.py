"""Text in pictures: a font that has its characters, or a spelling without those that no font has."""

import functools
import subprocess
import unicodedata
from collections.abc import Iterator
from importlib import util
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Of systems without fontconfig, by the names of their files: DejaVu, Noto, and what macOS and Windows ship.
_FILES = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "PingFang.ttc", "msyh.ttc", "malgun.ttf",
          "segoeui.ttf")  # fmt: skip
_MISSING = "\U0010fffe"  # no character: fonts draw it as they draw what they lack


def fitting(text: str, size: int) -> tuple[Font, str]:
    """Returns a font of `size` pixels and the text to draw with it.

    ASCII is drawn in Pillow's own font, so that such pictures are the same on every machine. For other text the first
    font that has all of it is taken: matplotlib's, one of the system's by its file name, or the one that fontconfig
    names. Where none has all, what is missing is written without accents, or as its code, such as `\\u732b`.
    """
    default = ImageFont.load_default(size)
    if text.isascii():
        return default, text
    best: Font = default
    fewest = len(text) + 1
    for file in _candidates(next(c for c in text if not c.isascii())):
        font = ImageFont.truetype(file, size)
        lacking = sum(not _has(font, c) for c in text)
        if not lacking:
            return font, text
        if lacking < fewest:
            best, fewest = font, lacking
    return best, "".join(c if _has(best, c) else _spelled(c) for c in text)


def _has(font: Font, character: str) -> bool:
    return character.isascii() or bytes(font.getmask(character)) != bytes(font.getmask(_MISSING))


def _spelled(character: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", character) if c.isascii())
    return plain or character.encode("unicode_escape").decode("ascii")


def _candidates(character: str) -> Iterator[str]:
    """The files of fonts that may have a character, each only once the ones before it did not do."""
    found = util.find_spec("matplotlib")
    if found and found.origin and (file := Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf").is_file():
        yield str(file)
    yield from filter(None, map(_of_system, _FILES))
    if file_name := _of_fontconfig(ord(character)):
        yield file_name


@functools.cache
def _of_system(file: str) -> str:
    try:
        return str(ImageFont.truetype(file, 10).path)  # Pillow looks into the folders of the system
    except OSError:
        return ""


@functools.cache
def _of_fontconfig(code: int) -> str:
    try:
        file = subprocess.run(["fc-match", "--format=%{file}", f":charset={code:x}"], capture_output=True, check=True,
                              timeout=10).stdout.decode()  # fmt: skip
        ImageFont.truetype(file, 10)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return file
