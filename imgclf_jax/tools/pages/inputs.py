"""Images named on the command line: files, directories, glob patterns, or names on standard input."""

import glob
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from imgclf_jax.core import terminal
from imgclf_jax.core.errors import UsageError, UserError, no_such
from imgclf_jax.core.text import printable
from imgclf_jax.data import image_files


def check(files: Sequence[str], **_: object) -> None:
    """Raises UserError if a word names nothing or no regular file, or if a directory has no images."""
    for word in (word for word in files if word != "-"):
        if not os.path.exists(word) and not glob.has_magic(word):
            raise no_such("images", "file or directory", word)
        if os.path.exists(word) and not os.path.isdir(word) and not os.path.isfile(word):
            raise UserError(f"{word!r} is a pipe, socket or device; name image files or directories")
        if not os.path.isfile(word) and not next(iter(_expand(word)), None):
            raise UserError(f"{word!r} has no images")


def find(words: Sequence[str]) -> list[str]:
    """The image files that `words` name, in order. A word is one of:

    - a file;
    - a directory, for the images inside it in the order of their names (see `image_files.walk`);
    - a pattern of Python's `glob`, with `**` for folders of any depth, sorted by folder;
    - `-` for standard input, where each line names a file.

    Raises UserError if there are none, or if standard input is not text.
    """
    images = [image for word in words for image in (_read_stdin() if word == "-" else _expand(word))]
    if not images:
        raise UsageError("name at least one image: FILE|DIR|GLOB|-")
    return images


class Results:
    """The images, each with the model's outputs or the error if it is unusable: see `Trained.stream`.

    Iterating prints each failure and counts them in `failed`.
    """

    def __init__(self, images: Sequence[str], outputs: Iterable[Any], doing: str):
        self._results = terminal.track(zip(images, outputs, strict=True), len(images), doing)
        self._count, self.failed = len(images), 0

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for image, result in self._results:
            if isinstance(result, UserError):
                self.failed += 1
                print(f"error: {printable(str(result))}", file=sys.stderr)
            yield image, result
        if self.failed and self._count > 1:
            print(f"error: {self.failed} of {self._count} images failed", file=sys.stderr)


def _expand(word: str) -> Iterator[str]:
    if os.path.isdir(word):
        yield from (os.path.join(word, name) for name in image_files.walk(word))
    elif os.path.exists(word):
        yield word
    else:
        matches = filter(os.path.isfile, glob.iglob(word, recursive=True))
        yield from sorted(matches, key=lambda name: name.split(os.sep))


def _read_stdin() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as Python decodes the names on the command line
    for line in sys.stdin:
        if "\0" in line:
            raise UserError("'-' reads one file name per line from standard input, but got binary data; name the image")
        if name := line.rstrip("\r\n"):
            yield name
