"""Splits in TFDS's syntax, `train[:90%]+extra[100:200]`, for every source."""

import re
from collections.abc import Mapping
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


def resolve(text: str, sizes: Mapping[str, int]) -> list[Part]:
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


def describe(train: str, evals: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """A line that says which split serves what, and what of the base splits, given their sizes, serves nothing.

    `evals` are the evaluation sets by name; one of another source, `folder('x')/test`, is named without its size.
    """
    texts = [train, *(text for text in evals.values() if ")" not in text)]
    parts = {text: resolve(text, sizes) for text in texts}

    def words(text: str) -> str:
        return f"{text} ({sum(p.stop - p.start for p in parts[text])})" if text in parts else text

    said = [f"trained on: {words(train)}"]
    if evals:
        said.append("evaluated: " + ", ".join(f"{name} = {words(text)}" for name, text in evals.items()))
    used = [part for some in parts.values() for part in some]
    unused = {name: n - _covered([part for part in used if part.name == name]) for name, n in sizes.items()}
    if left := [f"{count} of the {sizes[name]} examples of {name}" for name, count in unused.items() if count]:
        said.append("not used: " + ", ".join(left))
    return "; ".join(said)


def _covered(parts: list[Part]) -> int:
    """How many examples of a base split are in at least one of its parts."""
    count = end = 0
    for part in sorted(parts, key=lambda part: part.start):
        count += max(0, part.stop - max(part.start, end))
        end = max(end, part.stop)
    return count


def _bound(text: str | None, n: int, default: int, piece: str) -> int:
    if text is None:
        return default
    percent = text.endswith("%")
    number = float(text[:-1]) if percent else int(text)
    if abs(number) > (100 if percent else n):
        raise UserError(f"split {piece.strip()!r} reaches outside of the {n} examples that there are")
    bound = round(number * n / 100) if percent else int(number)
    return bound + n if number < 0 else bound
