"""Images named on the command line: files, directories, glob patterns, or names on standard input."""

import io
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from imgclf_jax.core import terminal
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.data import image_files
from imgclf_jax.step import Outputs
from imgclf_jax.trained import Trained

log = logging.getLogger(__name__)


class Input(NamedTuple):
    """An image file. `found`: a directory or a pattern contained it, rather than its own name being given."""

    path: str
    found: bool = False


def find(command: str, words: list[str], skip: Callable[[str], bool] = lambda path: False) -> Iterator[Input]:
    """Iterates over the image files that `words` name, in order and lazily, so that their number is unlimited.

    A word is one of:

    - a file;
    - a directory, for the images inside it in the order of their names (see `image_files.walk`); the log counts the
      other files;
    - a pattern of Python's `pathlib`, with `**` for folders of any depth;
    - `-` for standard input, where each line names a file.

    Files of directories and patterns are left out if `skip(path)` is true. Raises UserError during iteration if
    standard input is not text; `early.check` has found the files of all words.
    """
    images = (image for word in words for image in (_read_stdin(command) if word == "-" else _expand(word)))
    return (image for image in images if not (image.found and skip(image.path)))


def count(words: list[str], skip: Callable[[str], bool] = lambda path: False, seconds: float = 1.0) -> int | None:
    """The number of files that `find` iterates over; None with standard input, or if counting takes longer."""
    if "-" in words:
        return None
    end, number = time.monotonic() + seconds, 0
    try:
        for word in words:
            for image in _expand(word, log_strays=False):
                number += not (image.found and skip(image.path))
                if time.monotonic() > end:
                    return None
    except (OSError, UserError):  # such as a folder that cannot be read, which the iteration itself reports
        return None
    return number


class Results:
    """The images, `total` if known, each with the model's outputs or the error if it is unusable: see `Trained.stream`.

    Iterating counts the images and prints the failures. An error for which `skips(image, error)` holds is no failure.
    """

    def __init__(
        self, model: Trained, outputs: Outputs, images: Iterable[Input], total: int | None, doing: str,
        skips: Callable[[Input, UserError], bool] = lambda image, error: False,
    ):  # fmt: skip
        waiting: deque[Input] = deque()

        def begin(image: Input) -> str:
            waiting.append(image)
            return image.path

        results = ((waiting.popleft(), result) for result in model.stream(outputs, map(begin, images)))
        self._results = terminal.track(results, total, doing)
        self._skips, self._all, self._failed = skips, 0, 0

    def __iter__(self) -> Iterator[tuple[Input, np.ndarray | UserError]]:
        for image, result in self._results:
            self._all += 1
            if isinstance(result, UserError) and not self._skips(image, result):
                self._failed += 1
                print(f"error: {printable(str(result))}", file=sys.stderr)
            yield image, result

    def end(self, failure: str, errors: Sequence[Exception]) -> int:
        """Prints how many images failed, as in "cannot classify 2 of 9 images", and returns the exit status.

        Raises the first of the `errors` that ended the iteration early.
        """
        if self._failed:
            print(f"error: {failure} {self._failed} of {self._all} images", file=sys.stderr)
        if errors:
            raise errors[0]
        return 1 if self._failed else 0


def _expand(word: str, log_strays: bool = True) -> Iterable[Input]:
    if os.path.isdir(word):
        return _list_folder(word, log_strays)
    if os.path.exists(word):
        return [Input(word)]
    return (Input(name, found=True) for name in image_files.match(word))


def _list_folder(folder: str, log_strays: bool) -> Iterator[Input]:
    strays: Counter[str] = Counter()
    for name in image_files.walk(folder, strays):
        yield Input(os.path.join(folder, name), found=True)
    if log_strays and (counted := image_files.describe_strays(strays)):
        log.info("%s: not used: %s", folder, counted)


def _read_stdin(command: str) -> Iterator[Input]:
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        sys.stdin.reconfigure(errors="surrogateescape")  # as Python decodes the names on the command line
    for line in sys.stdin:
        if "\0" in line:
            raise UserError(f"{command}: '-' reads one file name per line from standard input, but got binary data; "
                            f"name the image itself: {command} FILE")  # fmt: skip
        if name := line.rstrip("\r\n"):
            yield Input(name)
