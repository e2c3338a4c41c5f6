"""Splits in TFDS syntax, `train[:90%]+extra[100:200]`, for every source."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from imgclf_jax.core.errors import UserError, unknown

_BOUND = r"\s*(-?\d{1,18}|-?\d{1,18}(?:\.\d{1,18})?%)?\s*"
_PART = re.compile(rf"\s*([\w.-]+)\s*(?:\[{_BOUND}:{_BOUND}\])?\s*")


class Part(NamedTuple):
    """Examples start to stop (exclusive) of one base split."""

    name: str
    start: int
    stop: int


def resolve(text: str, sizes: Mapping[str, int]) -> list[Part]:
    """Resolves a split into parts, given the size of each base split.

    A percentage is rounded to the nearest example and a negative bound counts from the end, as in TFDS. Raises
    UserError for text outside the syntax, an unknown base split, a bound outside it, and a split without examples.
    """
    parts = []
    for piece in text.split("+"):
        match = _PART.fullmatch(piece)
        if not match:
            raise UserError(f"split {text!r} does not parse; write 'train', 'train[:90%]', 'train[100:]' or 'a+b'")
        name, start, stop = match.groups()
        if name not in sizes:
            first = next(iter(sizes))
            raise UserError(f"{unknown('split', name, sizes)}; to hold out a part of {first}, pass "
                            f"--config.data.train='{first}[:90%]' --config.data.eval.test='{first}[90%:]'")  # fmt: skip
        n = sizes[name]
        if start and stop and start.endswith("%") != stop.endswith("%"):  # TFDS reads both as percentages
            raise UserError(f"split {piece.strip()!r} mixes a number with a percentage; write both in the same form")
        part = Part(name, _bound(start, n, 0, piece), _bound(stop, n, n, piece))
        if part.start >= part.stop:
            raise UserError(f"split {piece.strip()!r} has no examples; {name!r} has {n}: take a larger part")
        parts.append(part)
    return parts


def check_disjoint(text: str, sizes: Mapping[str, int]) -> None:
    """Raises UserError if the parts of an evaluation split overlap, since each of its examples counts once."""
    parts = resolve(text, sizes)
    total, different = sum(part.stop - part.start for part in parts), _covered(parts).total()
    if total > different:
        raise UserError(f"the parts of the evaluation split {text!r} overlap: they have {total} examples, of which "
                        f"only {different} differ; write parts that do not overlap")  # fmt: skip


def count_shared(train: str, evals: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """For each evaluation set of the same source, how many of its examples are in the split `train`, and its size."""
    trained = resolve(train, sizes)
    shared = {}
    for name, text in evals.items():
        if ")" not in text:
            parts = resolve(text, sizes)
            common = [Part(a.name, max(a.start, b.start), min(a.stop, b.stop))
                      for a in parts for b in trained if a.name == b.name]  # fmt: skip
            shared[name] = _covered(common).total(), sum(part.stop - part.start for part in parts)
    return shared


def _covered(parts: list[Part]) -> Counter[str]:
    """The number of examples of each base split in at least one of the parts. Some parts may be empty."""
    counts, ends = Counter[str](), Counter[str]()
    for part in sorted(parts, key=lambda part: part.start):
        counts[part.name] += max(0, part.stop - max(part.start, ends[part.name]))
        ends[part.name] = max(ends[part.name], part.stop)
    return counts


def _bound(text: str | None, n: int, default: int, piece: str) -> int:
    if text is None:
        return default
    percent = text.endswith("%")
    number = float(text[:-1]) if percent else int(text)
    if abs(number) > (100 if percent else n):
        raise UserError(f"split {piece.strip()!r} reaches beyond the {n} examples of its base split")
    bound = round(number * n / 100) if percent else int(number)
    return bound + n if number < 0 else bound
