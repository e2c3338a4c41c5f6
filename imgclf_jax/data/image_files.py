"""Lists the image files of a folder, for training, evaluation and prediction alike."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from imgclf_jax.core.errors import UserError

# Suffixes of images. `decode` does not read them all: files of the others are reported as unreadable images.
_FORMATS = """apng avif avifs bmp bw cur dcx dds dib gif icb icns ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo msp
    pbm pcx pfm pgm png pnm ppm psd qoi ras rgb rgba sgi tga tif tiff vda vst webp xbm xpm
    arw cr2 cr3 dng heic heif jxl nef orf raf rw2"""
_SUFFIXES = frozenset("." + name for name in _FORMATS.split())


def walk(folder: Path | str, strays: Counter[str]) -> Iterator[str]:
    """Yields the images below `folder`, their names relative to it, and counts other files by kind in `strays`.

    They are sorted by name within each folder, which is listed when it is reached. An image has the suffix of an image
    format, and is a regular file, a link to one, or a link to nothing. Hidden files and folders are skipped. Links to
    folders are followed, but each folder is entered once, and `folder`'s own parents are not. Raises UserError for an
    unreadable folder.
    """
    entered = {_identity(parent) for parent in Path(folder).resolve().parents}

    def inside(prefix: str) -> Iterator[str]:
        directory = os.path.join(folder, prefix)
        try:
            if (own := _identity(directory)) in entered:
                strays["link to a listed folder"] += 1
                return
            entered.add(own)
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as e:
            raise UserError(f"cannot read the folder {directory}: {e.strerror}; make it readable or move it") from e
        for entry in entries:
            if entry.name.startswith("."):
                strays["hidden"] += 1
            elif os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                yield from inside(f"{prefix}{entry.name}/")
            elif kind := _kind_of_stray(entry):
                strays[kind] += 1
            else:
                yield prefix + entry.name

    yield from inside("")


def _kind_of_stray(entry: os.DirEntry[str]) -> str:
    """What a file is that is no image, such as ".txt"; "" for an image."""
    suffix = os.path.splitext(entry.name)[1].lower()
    leads_nowhere = entry.is_symlink() and not os.path.exists(entry)
    if not leads_nowhere and not (os.path.isfile(entry) if entry.is_symlink() else entry.is_file()):
        return "pipe, socket or device"
    return "" if suffix in _SUFFIXES else "broken link" if leads_nowhere else suffix or entry.name


def find(folder: Path | str) -> tuple[list[str], Counter[str]]:
    """Returns the images below `folder`, and the number of other files by kind: see `walk`."""
    strays: Counter[str] = Counter()
    return list(walk(folder, strays)), strays


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


def describe_strays(strays: Counter[str]) -> str:
    """`12 non-image files (9 .txt, 2 hidden, 1 README)`, with the five most frequent kinds; "" for none."""
    if not strays:
        return ""
    kinds = sorted(strays.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {kind}" for kind, count in kinds[:5]] + ["…"] * (len(kinds) > 5)
    return f"{strays.total()} non-image file{'s' * (strays.total() > 1)} ({', '.join(shown)})"
