"""The images that a command is given: files, directories, patterns, or names on standard input."""

import glob
import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import image_files
from imgclf_jax.step import Outputs
from imgclf_jax.trained import Trained

log = logging.getLogger(__name__)


class Input(NamedTuple):
    """An image file, and whether it was found in a directory rather than named."""

    path: str
    found: bool = False


def find(command: str, words: list[str]) -> Iterator[Input]:
    """The image files that `words` name, in this order: a file, a directory, a pattern, or `-` for standard input.

    They are looked for while they are used, so that there may be any number. Of a directory these are the images inside
    (see `image_files.walk`), in the order of their names; how many other files there are is logged. A pattern is one of
    Python's `glob`, with `**` for folders of any depth. On standard input each line is the name of a file.

    Raises UserError at once for a word that names nothing, or no regular file, and for a directory without images; and
    while they are used, if what stands on standard input is no text.
    """
    if not words:
        raise UserError(f"{command}: name at least one image: launch.py {command} FILE|DIR|GLOB|- … --workdir DIR")
    for word in words:
        if word != "-":
            _check(command, word)
    return (one for word in words for one in (_from_input(command) if word == "-" else _named(word)))


def computed(model: Trained, what: Outputs, images: Iterable[Input]) -> Iterator[tuple[Input, np.ndarray | UserError]]:
    """Each image with what the model computes of it, see `Trained.stream`, or with the error if it cannot be used."""
    waiting: deque[Input] = deque()

    def paths() -> Iterator[str]:
        for image in images:
            waiting.append(image)
            yield image.path

    return ((waiting.popleft(), result) for result in model.stream(what, paths()))


def until_error[T](items: Iterable[T], errors: list[Exception]) -> Iterator[T]:
    """The items; an error ends them and is put into `errors`, so that what came before can be written first."""
    try:
        yield from items
    except Exception as e:
        errors.append(e)


def _check(command: str, word: str) -> None:
    path = Path(word)
    if path.is_dir():
        if next(image_files.walk(path, Counter()), None) is None:
            raise UserError(f"{command}: the directory {word!r} holds no images")
    elif not path.exists():
        if not glob.has_magic(word):
            raise UserError(f"{command}: there is no file or directory {word!r} (working directory: {Path.cwd()})")
        if next(glob.iglob(word, recursive=True), None) is None:
            raise UserError(f"{command}: the pattern {word!r} matches no file (working directory: {Path.cwd()})")
    elif not path.is_file():
        raise UserError(f"{command}: {word!r} is a pipe, socket or device; name image files or directories")


def _named(word: str) -> Iterable[Input]:
    if os.path.isdir(word):
        return _inside(word)
    if os.path.exists(word):
        return [Input(word)]
    matches = sorted(glob.iglob(word, recursive=True), key=lambda name: name.split(os.sep))
    return (Input(name, found=True) for name in matches if os.path.isfile(name))


def _inside(folder: str) -> Iterator[Input]:
    strays: Counter[str] = Counter()
    for name, _ in image_files.walk(folder, strays):
        yield Input(os.path.join(folder, name), found=True)
    if counted := image_files.counted(strays):
        log.info("%s: not used: %s", folder, counted)


def _from_input(command: str) -> Iterator[Input]:
    for line in sys.stdin:
        if "\0" in line:
            raise UserError(f"{command}: - reads names of files from standard input, one a line, and found other bytes "
                            f"there; name the image itself: launch.py {command} FILE")  # fmt: skip
        if name := line.rstrip("\r\n"):
            yield Input(name)
