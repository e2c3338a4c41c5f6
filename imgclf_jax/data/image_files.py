"""Which files of a folder are images. Training, evaluation and prediction all ask here."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from imgclf_jax.core.errors import UserError

# Formats of pixels. `decode` does not read them all: such a file is a photograph too, and is named as unreadable.
_FORMATS = """apng avif avifs bmp bw cur dcx dds dib gif icb icns ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo msp
    pbm pcx pfm pgm png pnm ppm psd qoi ras rgb rgba sgi tga tif tiff vda vst webp xbm xpm
    arw cr2 cr3 dng heic heif jxl nef orf raf rw2"""
_SUFFIXES = frozenset("." + name for name in _FORMATS.split())
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|II\*\0|MM\0\*|BM.{4}\0{4}|P[1-6]\s+(#[^\n]*\s+)*\d+\s"
    rb"|.{4}ftyp(avif|avis|heic|heix|mif1|msf1)|\0\0\0\x0cjP  ",
    re.DOTALL,
)

Stamp = tuple[int, int]  # a file's size in bytes, and the time of its last change in nanoseconds


@dataclass
class Found:
    """What lies in a folder and the folders in it; names are relative to it, with `/`."""

    images: dict[str, Stamp] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)  # names of images that are links to nowhere → the reason
    strays: Counter[str] = field(default_factory=Counter)  # kind of a file that is no image → how many


def find(folder: Path | str) -> Found:
    """The image files in `folder` and in the folders in it, and how many others there are.

    An image is a regular file, or a link to one, with the suffix of an image format or with content that begins as
    one does. Hidden files and folders are none. Links to folders are followed, but not in a circle. Raises UserError
    for a folder that cannot be read.
    """
    found = Found()
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]  # (prefix, the folders that it lies in)
    while todo:
        prefix, above = todo.pop()
        directory = os.path.join(folder, prefix)
        try:
            stat = os.stat(directory)
            entries = [] if (stat.st_dev, stat.st_ino) in above else list(os.scandir(directory))
        except OSError as e:
            raise UserError(f"the folder {directory} cannot be read: {e.strerror}; make it readable or move it") from e
        for entry in entries:
            if entry.name.startswith("."):
                found.strays["hidden"] += 1
            elif entry.is_dir():
                todo.append((f"{prefix}{entry.name}/", above | {(stat.st_dev, stat.st_ino)}))
            else:
                _sort(entry, prefix + entry.name, found)
    return found


def beside(folders: list[Path]) -> Found:
    """The files that lie in these folders themselves, and not in a folder in them."""
    found = Found()
    for folder in folders:
        for entry in os.scandir(folder):
            if entry.name.startswith("."):
                found.strays["hidden"] += 1
            elif not entry.is_dir():
                _sort(entry, os.path.join(folder, entry.name), found)
    return found


def _sort(entry: os.DirEntry, name: str, found: Found) -> None:
    """Puts a file where it belongs in `found`."""
    suffix = os.path.splitext(name)[1].lower()
    try:
        stat = entry.stat()
    except OSError as e:
        if suffix in _SUFFIXES:
            found.lost[name] = e.strerror or str(e)
        else:
            found.strays["link to nowhere"] += 1
        return
    if not entry.is_file():
        found.strays["pipe, socket or device"] += 1
    elif suffix in _SUFFIXES or _begins_as_image(entry.path):
        found.images[name] = (stat.st_size, stat.st_mtime_ns)
    else:
        found.strays[suffix or entry.name] += 1


def _begins_as_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(_SIGNATURES.match(file.read(256)))
    except OSError:
        return False  # without an image's suffix either, so it is a stray


def counted(strays: Counter[str]) -> str:
    """`12 files that are no images (9 .txt, 2 hidden, 1 README)`, the five most frequent kinds; "" if there is none."""
    if not strays:
        return ""
    kinds = sorted(strays.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {kind}" for kind, count in kinds[:5]] + ["…"] * (len(kinds) > 5)
    what = "1 file that is no image" if strays.total() == 1 else f"{strays.total()} files that are no images"
    return f"{what} ({', '.join(shown)})"
