"""Splits in TFDS's syntax, `train[:90%]+extra[100:200]`, for every source."""

import re
from dataclasses import dataclass

from imgclf_jax.core.errors import UserError, unknown

_BOUND = r"\s*(-?\d{1,18}|-?\d{1,18}(?:\.\d{1,18})?%)?\s*"
_PART = re.compile(rf"\s*([\w.-]+)\s*(?:\[{_BOUND}:{_BOUND}\])?\s*")


@dataclass(frozen=True)
class Part:
    """Examples start to stop (exclusive) of one base split."""

    name: str
    start: int
    stop: int


def resolve(text: str, sizes: dict[str, int]) -> list[Part]:
    """The parts of a split, given the size of each base split.

    A percentage is rounded to the nearest example and a negative bound counts from the end, as TFDS does. Raises
    UserError for text outside the syntax, an unknown base split, a bound outside of it and a split without examples.
    """
    parts = []
    for piece in text.split("+"):
        match = _PART.fullmatch(piece)
        if not match:
            raise UserError(f"split {text!r} does not parse; write 'train', 'train[:90%]', 'train[100:]' or 'a+b'")
        name, start, stop = match.groups()
        if name not in sizes:
            raise UserError(unknown("split", name, sizes))
        n = sizes[name]
        if start and stop and start.endswith("%") != stop.endswith("%"):  # TFDS reads both as percentages
            raise UserError(f"split {piece.strip()!r} mixes a number with a percentage; write both as one or the other")
        part = Part(name, _bound(start, n, 0, piece), _bound(stop, n, n, piece))
        if part.start >= part.stop:
            raise UserError(f"split {piece.strip()!r} holds no example; {name!r} has {n}")
        parts.append(part)
    return parts


def _bound(text: str | None, n: int, default: int, piece: str) -> int:
    if text is None:
        return default
    percent = text.endswith("%")
    number = float(text[:-1]) if percent else int(text)
    if abs(number) > (100 if percent else n):
        raise UserError(f"split {piece.strip()!r} reaches outside of the {n} examples that there are")
    bound = round(number * n / 100) if percent else int(number)
    return bound + n if number < 0 else bound
