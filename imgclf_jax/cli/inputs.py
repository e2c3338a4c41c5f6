"""Images named on the command line: files, directories, glob patterns, or names on standard input."""

import glob
import io
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from imgclf_jax.core import terminal
from imgclf_jax.core.errors import UserError, no_such
from imgclf_jax.core.text import printable
from imgclf_jax.data import image_files

log = logging.getLogger(__name__)


class Input(NamedTuple):
    """An image file. `found`: a directory or a pattern contained it, rather than its own name being given."""

    path: str
    found: bool = False


def check(files: Sequence[str], **_: object) -> None:
    """Raises UserError if a word names nothing or no regular file, or if a directory has no images."""
    for word in (word for word in files if word != "-"):
        if not os.path.exists(word) and not glob.has_magic(word):
            raise no_such("images", "file or directory", word)
        if os.path.exists(word) and not os.path.isdir(word) and not os.path.isfile(word):
            raise UserError(f"{word!r} is a pipe, socket or device; name image files or directories")
        if not os.path.isfile(word) and not next(iter(_expand(word)), None):
            raise UserError(f"{word!r} has no images")


def find(words: Sequence[str], skip: Callable[[str], bool] = lambda path: False) -> list[Input]:
    """The image files that `words` name, in order. A word is one of:

    - a file;
    - a directory, for the images inside it in the order of their names (see `image_files.walk`);
    - a pattern of Python's `pathlib`, with `**` for folders of any depth;
    - `-` for standard input, where each line names a file.

    Files of directories and patterns are left out if `skip(path)` is true. Raises UserError if there are none, or if
    standard input is not text.
    """
    images = [image for word in words for image in (_read_stdin() if word == "-" else _expand(word))]
    if not images:
        raise UserError("name at least one image: FILE|DIR|GLOB|-")
    return [image for image in images if not (image.found and skip(image.path))]


class Results:
    """The images, each with the model's outputs or the error if it is unusable: see `Trained.stream`.

    Iterating prints each failure and counts them in `failed`. An error for which `skips(image, error)` holds is none.
    """

    def __init__(
        self, images: Sequence[Input], outputs: Iterable[Any], doing: str,
        skips: Callable[[Input, UserError], bool] = lambda image, error: False,
    ):  # fmt: skip
        self._results = terminal.track(zip(images, outputs, strict=True), len(images), doing)
        self._skips, self._count, self.failed = skips, len(images), 0

    def __iter__(self) -> Iterator[tuple[Input, Any]]:
        for image, result in self._results:
            if isinstance(result, UserError) and not self._skips(image, result):
                self.failed += 1
                print(f"error: {printable(str(result))}", file=sys.stderr)
            yield image, result
        if self.failed:
            print(f"error: {self.failed} of {self._count} images failed", file=sys.stderr)


def _expand(word: str) -> Iterator[Input]:
    if os.path.isdir(word):
        strays: Counter[str] = Counter()
        for name in image_files.walk(word, strays):
            yield Input(os.path.join(word, name), found=True)
        if counted := image_files.describe_strays(strays):
            log.info("%s: not used: %s", word, counted)
    elif os.path.exists(word):
        yield Input(word)
    else:
        yield from (Input(name, found=True) for name in image_files.match(word))


def _read_stdin() -> Iterator[Input]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as Python decodes the names on the command line
    for line in sys.stdin:
        if "\0" in line:
            raise UserError("'-' reads one file name per line from standard input, but got binary data; name the image")
        if name := line.rstrip("\r\n"):
            yield Input(name)
