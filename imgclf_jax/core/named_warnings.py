"""Logs Pillow's warnings with the name of the image: "cat/1.jpg: Corrupt EXIF data"."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

log = logging.getLogger(__name__)

_MAX_LINES = 100  # per process
_thread = threading.local()
_logged: set[tuple[str, str]] = set()
_default = warnings.showwarning


@contextlib.contextmanager
def about(name: Callable[[], str]) -> Iterator[None]:
    """Attributes warnings of this thread inside to the image of this name, since `warnings` knows no threads."""
    _thread.name = name
    try:
        yield
    finally:
        _thread.name = None


def install() -> None:
    """Logs Pillow's warnings from now on, each once per image; other warnings are printed as before."""
    warnings.showwarning = _show
    warnings.filterwarnings("always", module=r"PIL\.")  # by default a text is shown only for the first image


def _show(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    if not (name := getattr(_thread, "name", None)):
        return _default(message, category, filename, lineno, file, line)
    warning = (name(), str(message).strip())
    if warning in _logged or len(_logged) > _MAX_LINES:
        return None
    _logged.add(warning)
    if len(_logged) > _MAX_LINES:
        log.warning("more than %d image warnings; the rest are not logged", _MAX_LINES)
    else:
        log.warning("%s: %s", *warning)
    return None
