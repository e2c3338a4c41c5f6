"""Splits in TFDS's syntax, `train[:90%]+extra[100:200]`, for every source."""

import re
from dataclasses import dataclass

from imgclf_jax.errors import UserError, unknown

_PART = re.compile(r"\s*([\w.-]+)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*")


@dataclass(frozen=True)
class Part:
    """Examples start to stop (exclusive) of one base split."""

    name: str
    start: int
    stop: int


def resolve(text: str, sizes: dict[str, int]) -> list[Part]:
    """The parts of a split, given the size of each base split.

    A percentage is rounded to the nearest example and a negative bound counts from the end, as TFDS does. Raises
    UserError for text outside the syntax, an unknown base split and a split without examples.
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
        part = Part(name, _bound(start, n, 0), _bound(stop, n, n))
        if part.start >= part.stop:
            raise UserError(f"split {piece.strip()!r} holds no example; {name!r} has {n}")
        parts.append(part)
    return parts


def _bound(text: str | None, n: int, default: int) -> int:
    if text is None:
        return default
    bound = round(int(text[:-1]) * n / 100) if text.endswith("%") else int(text)
    return min(max(bound + n if text.startswith("-") else bound, 0), n)
