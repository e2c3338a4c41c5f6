"""Lists the image files of a folder, for training, evaluation and prediction alike."""

import os
from collections.abc import Iterator
from pathlib import Path

from imgclf_jax.core.errors import UserError

# Suffixes of images. `decode` does not read them all: files of the others are reported as unreadable images.
_FORMATS = """apng avif avifs bmp bw cur dcx dds dib gif icb icns ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo msp
    pbm pcx pfm pgm png pnm ppm psd qoi ras rgb rgba sgi tga tif tiff vda vst webp xbm xpm
    arw cr2 cr3 dng heic heif jxl nef orf raf rw2"""
_SUFFIXES = frozenset("." + name for name in _FORMATS.split())


def walk(folder: Path | str) -> Iterator[str]:
    """Yields the images below `folder`, their names relative to it, sorted by name within each folder.

    An image has the suffix of an image format, and is a regular file, a link to one, or a link to nothing. Hidden files
    and folders are skipped. Links to folders are followed, but each folder is entered once, and `folder`'s own parents
    are not. Raises UserError for an unreadable folder.
    """
    entered = {_identity(parent) for parent in Path(folder).resolve().parents}

    def inside(prefix: str) -> Iterator[str]:
        directory = os.path.join(folder, prefix)
        try:
            if (own := _identity(directory)) in entered:
                return
            entered.add(own)
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as e:
            raise UserError(f"cannot read the folder {directory}: {e.strerror}; make it readable or move it") from e
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_image = os.path.splitext(entry.name)[1].lower() in _SUFFIXES
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                yield from inside(f"{prefix}{entry.name}/")
            elif is_image and (os.path.isfile(entry) or not os.path.exists(entry)):
                yield prefix + entry.name

    yield from inside("")


def _identity(directory: Path | str) -> tuple[int, int]:
    stat = os.stat(directory)
    return stat.st_dev, stat.st_ino
