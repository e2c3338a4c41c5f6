"""Which files of a folder are images. Training, evaluation and prediction all ask here."""

import os
import re
from collections import Counter
from collections.abc import Iterator
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

# A file's size in bytes, and when its contents and when anything of it last changed, in nanoseconds. The second time
# tells a file that was replaced by one whose first time was set back, as `cp -p` does.
Stamp = tuple[int, int, int]


@dataclass
class Found:
    """What lies in a folder and the folders in it; names are relative to it, with `/`."""

    images: dict[str, Stamp] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)  # names of images that are links to nowhere → the reason
    strays: Counter[str] = field(default_factory=Counter)  # kind of a file that is no image → how many

    def count(self) -> int:
        """How many files have been found so far."""
        return len(self.images) + len(self.lost) + sum(list(self.strays.values()))


def find(folder: Path | str, found: Found | None = None) -> Found:
    """The image files in `folder` and in the folders in it, and how many others there are. See `walk`.

    With `found` they are added to it, so that another thread can count them meanwhile.
    """
    found = Found() if found is None else found
    for name, stamp in walk(folder, found.strays):
        if isinstance(stamp, str):
            found.lost[name] = stamp
        else:
            found.images[name] = stamp
    return found


def walk(folder: Path | str, strays: Counter[str]) -> Iterator[tuple[str, Stamp | str]]:
    """The images in `folder` and in the folders in it, one by one: (name, stamp, or why it cannot be read).

    They come in the order of their names, folder by folder, each folder listed when it is reached. Files that are no
    images are counted in `strays`. An image is a regular file, or a link to one, with the suffix of an image format or
    with content that begins as one does. Hidden files and folders are none. Links to folders are followed, but not in a
    circle. Raises UserError for a folder that cannot be read.
    """

    def entries(prefix: str, above: frozenset[tuple[int, int]]) -> _Level:
        directory = os.path.join(folder, prefix)
        try:
            stat = os.stat(directory)
            own = (stat.st_dev, stat.st_ino)
            inside = [] if own in above else sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as e:
            raise UserError(f"the folder {directory} cannot be read: {e.strerror}; make it readable or move it") from e
        return prefix, iter(inside), above | {own}

    levels = [entries("", frozenset())]
    while levels:
        prefix, inside, above = levels[-1]
        entry = next(inside, None)
        if entry is None:
            levels.pop()
        elif entry.name.startswith("."):
            strays["hidden"] += 1
        elif entry.is_dir():
            levels.append(entries(f"{prefix}{entry.name}/", above))
        elif (stamp := _stamp(entry, strays)) is not None:
            yield prefix + entry.name, stamp


# The start of names in a folder, its entries, and the folders that it lies in, itself included.
_Level = tuple[str, Iterator[os.DirEntry[str]], frozenset[tuple[int, int]]]


def beside(folders: list[Path]) -> Found:
    """The files that lie in these folders themselves, and not in a folder in them."""
    found = Found()
    for folder in folders:
        for entry in os.scandir(folder):
            if entry.name.startswith("."):
                found.strays["hidden"] += 1
            elif not entry.is_dir():
                name, stamp = os.path.join(folder, entry.name), _stamp(entry, found.strays)
                if isinstance(stamp, str):
                    found.lost[name] = stamp
                elif stamp:
                    found.images[name] = stamp
    return found


def _stamp(entry: os.DirEntry[str], strays: Counter[str]) -> Stamp | str | None:
    """The stamp of an image, or why it cannot be read; None for a file that is none, which is counted."""
    suffix = os.path.splitext(entry.name)[1].lower()
    try:
        stat = entry.stat()
    except OSError as e:
        if suffix in _SUFFIXES:
            return e.strerror or str(e)
        strays["link to nowhere"] += 1
        return None
    if not entry.is_file():
        strays["pipe, socket or device"] += 1
    elif suffix in _SUFFIXES or _begins_as_image(entry.path):
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    else:
        strays[suffix or entry.name] += 1
    return None


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
