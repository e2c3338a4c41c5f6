"""Lists the image files of a folder, for training, evaluation and prediction alike."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError

# Suffixes of images. `decode` does not read them all: files of the others are reported as unreadable images.
_FORMATS = """apng avif avifs bmp bw cur dcx dds dib gif icb icns ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo msp
    pbm pcx pfm pgm png pnm ppm psd qoi ras rgb rgba sgi tga tif tiff vda vst webp xbm xpm
    arw cr2 cr3 dng heic heif jxl nef orf raf rw2"""
_SUFFIXES = frozenset("." + name for name in _FORMATS.split())
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|II\*\0|MM\0\*|BM.{4}\0{4}|P[1-6]\s+(#[^\n]*\s+)*\d+\s"
    rb"|.{4}ftyp(avif|avis|heic|heix|mif1|msf1)|\0\0\0\x0cjP  ",
    re.DOTALL,
)

# Size in bytes, mtime and ctime in nanoseconds. The ctime reveals a replaced file whose mtime `cp -p` preserved.
Stamp = tuple[int, int, int]


@dataclass
class Listing:
    """The files below a folder; names are relative to it, with `/`."""

    images: dict[str, Stamp] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)  # names of images that are broken links → the reason
    strays: Counter[str] = field(default_factory=Counter)  # number of other files by kind

    def count(self) -> int:
        """The number of files found so far."""
        return len(self.images) + len(self.broken) + sum(list(self.strays.values()))


def find(folder: Path | str, listing: Listing | None = None) -> Listing:
    """Lists the images below `folder`, and counts other files: see `walk`.

    It adds them to `listing`, if not None, which another thread can count meanwhile.
    """
    listing = Listing() if listing is None else listing
    for name, stamp in walk(folder, listing.strays):
        if isinstance(stamp, str):
            listing.broken[name] = stamp
        else:
            listing.images[name] = stamp
    return listing


def walk(folder: Path | str, strays: Counter[str], recursive: bool = True) -> Iterator[tuple[str, Stamp | str]]:
    """Yields the images below `folder`: (name, stamp, or the reason why it is unreadable).

    They are sorted by name within each folder, which is listed when it is reached. Other files are counted in `strays`.
    Without `recursive`, sub-folders are skipped.
    An image is a regular file, or a link to one, with the suffix or the signature of an image format. Hidden files and
    folders are skipped. Links to folders are followed, but each folder is entered once, and `folder`'s own parents are
    not. Raises UserError for an unreadable folder.
    """
    entered = {_identity(parent) for parent in Path(folder).resolve().parents}

    def entries(prefix: str) -> tuple[str, Iterator[os.DirEntry[str]]]:
        directory = os.path.join(folder, prefix)
        try:
            own = _identity(directory)
            inside = [] if own in entered else sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as e:
            raise UserError(f"cannot read the folder {directory}: {e.strerror}; make it readable or move it") from e
        if own in entered:
            strays["link to a listed folder"] += 1
        entered.add(own)
        return prefix, iter(inside)

    levels = [entries("")]
    while levels:
        prefix, inside = levels[-1]
        entry = next(inside, None)
        if entry is None:
            levels.pop()
        elif entry.name.startswith("."):
            strays["hidden"] += 1
        elif _is_folder(entry):
            if recursive:
                levels.append(entries(f"{prefix}{entry.name}/"))
        elif (stamp := _stamp(entry, strays)) is not None:
            yield prefix + entry.name, stamp


def match(pattern: str) -> list[str]:
    """The regular files that match a pattern, sorted by folder. `**` enters no link, and wildcards match no dotfile."""
    if pattern.endswith(os.sep):  # which matches only folders
        return []
    root = Path(Path(pattern).anchor)
    parts = Path(pattern).relative_to(root).parts
    parts += ("*",) * (parts[-1] == "**")  # which matches only folders in Python 3.12
    found = (path for path in root.glob("/".join(parts)) if path.is_file())
    names = (str(path) for path in found if not any(part[0] == "." for part in set(path.parts) - set(parts)))
    return sorted(names, key=lambda name: name.split(os.sep))


def _identity(directory: Path | str) -> tuple[int, int]:
    stat = os.stat(directory)
    return stat.st_dev, stat.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # from a link to itself, or to a name that is too long
        return False


def _stamp(entry: os.DirEntry[str], strays: Counter[str]) -> Stamp | str | None:
    """The stamp of an image, or why it is unreadable; None for another file, which it counts."""
    suffix = os.path.splitext(entry.name)[1].lower()
    try:
        stat = entry.stat()
    except OSError as e:
        if suffix in _SUFFIXES:
            return e.strerror or str(e)
        strays["broken link"] += 1
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
        with paths.open_regular(Path(path)) as file:
            return bool(_SIGNATURES.match(file.read(256)))
    except OSError:
        return False  # it has no image suffix either


def describe_strays(strays: Counter[str]) -> str:
    """`12 non-image files (9 .txt, 2 hidden, 1 README)`, with the five most frequent kinds; "" for none."""
    if not strays:
        return ""
    kinds = sorted(strays.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {kind}" for kind, count in kinds[:5]] + ["…"] * (len(kinds) > 5)
    return f"{strays.total()} non-image file{'s' * (strays.total() > 1)} ({', '.join(shown)})"
