"""Warnings of the library that decodes images, as log lines that name the image: "cat/1.jpg: Corrupt EXIF data"."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)

_MOST = 100  # lines of a process
_thread = threading.local()
_said: set[tuple[str, str]] = set()
_usual = warnings.showwarning


@contextlib.contextmanager
def about(name: Callable[[], str]) -> Iterator[None]:
    """What is warned of inside is about the thing of this name. `warnings` itself cannot tell threads apart."""
    _thread.name = name
    try:
        yield
    finally:
        _thread.name = None


def to_log() -> None:
    """From now on Pillow's warnings are logged, each once for each image; others are printed as before."""
    warnings.showwarning = _show
    warnings.filterwarnings("always", module=r"PIL\.")  # usually a text is shown once, of whichever image is the first


def _show(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    if not (name := getattr(_thread, "name", None)):
        return _usual(message, category, filename, lineno, file, line)
    said = (name(), str(message).strip())
    if said in _said or len(_said) > _MOST:
        return None
    _said.add(said)
    if len(_said) > _MOST:
        log.warning("more than %d warnings of images: the rest is not shown", _MOST)
    else:
        log.warning("%s: %s", *said)
    return None
