"""Per-parameter rules: learning-rate and weight-decay multipliers and freezing, by path pattern or by layer.

A rule is a regular expression that must match a parameter's whole path, such as `backbone/block0/kernel`, and a value.
The first matching rule applies. Each rule must apply to at least one parameter.
"""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from imgclf_jax.core.errors import UserError

_ADAPTER = re.compile(r"backbone/lora/(.+)/[ab]")  # of `methods.lora`, for the kernel backbone/(.+)
_PART = re.compile(r"backbone/([^/]+)(/.+/)?")  # a part of the backbone, and the path of a module inside

# Commas separate rules, as in "a/.*=0.1, b/.*=1"; inside braces, as in "block\d{1,2}/.*", they belong to the pattern.
_COMMA = re.compile(r",(?![^{},]*\})")


@dataclass(frozen=True)
class Rules:
    """Multipliers and frozen parameters, by parameter path; absent paths have no rule."""

    lr: Mapping[str, float] = field(default_factory=dict)  # multiplies the update
    decay: Mapping[str, float] = field(default_factory=dict)  # multiplies the weight decay
    frozen: frozenset[str] = frozenset()  # paths that are not trained

    def __bool__(self) -> bool:
        return bool(self.lr or self.decay or self.frozen)

    def table(self, names: Iterable[str]) -> str:
        """A table of multipliers for the log; parameters of a module that have the same ones share a line."""

        def key(name: str) -> tuple[str, str]:
            factors = f"learning rate x {self.lr.get(name, 1):.4g}, weight decay x {self.decay.get(name, 1):.4g}"
            return "/".join(name.split("/")[:2]), "frozen" if name in self.frozen else factors

        grouped = [(module, [*some], text) for (module, text), some in itertools.groupby(names, key)]
        rows = [(f"{module}/* ({len(some)})" if some[1:] else some[0], text) for module, some, text in grouped]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def build(lr: str, decay: str, freeze: str, layer_decay: float, names: Sequence[str], freeze_also: str = "") -> Rules:
    """Builds the Rules of the config keys `rules.*` for parameters with the paths `names`.

    `names` are in the order in which the model uses them, which `layer_decay` needs. `freeze_also` is the method's
    pattern of frozen parameters; it trains the rest of the backbone. Raises UserError for text that is no rule, for a
    rule that applies to no parameter, and if every parameter is frozen.
    """
    rates = match(_numbers(lr, "rules.lr"), names, "rules.lr")
    if layer_decay:
        depths = layers(names)
        top = max(depths.values())
        rates = {name: rates.get(name, 1.0) * layer_decay ** (top - depths[name]) for name in names}
    frozen = match([(pattern, True) for pattern in split(freeze)], names, "rules.freeze")
    also = {name: True for name in names if re.fullmatch(freeze_also, name)}
    if also and (trained := [name for name in frozen if name.startswith("backbone/") and name not in also]):
        raise UserError(f"rules.freeze={freeze!r} matches {trained[0]}, which the method trains; remove the backbone "
                        "from rules.freeze, since the method freezes the rest of it")  # fmt: skip
    frozen |= also
    if len(frozen) == len(names):
        raise UserError(f"rules.freeze={freeze!r} matches every parameter: nothing is left to train")
    return Rules(rates, match(_numbers(decay, "rules.decay"), names, "rules.decay"), frozenset(frozen))


def match[Value](rules: Sequence[tuple[str, Value]], names: Sequence[str], key: str) -> dict[str, Value]:
    """Maps each name to the value of the first rule (pattern, value) whose pattern matches the whole name.

    Names without a match are absent. Raises UserError, naming the config key, for a rule without effect.
    """
    out: dict[str, Value] = {}
    for pattern, value in rules:
        try:
            expression = re.compile(pattern)
        except re.error as e:
            raise UserError(f"{key}: {pattern!r} is not a regular expression: {e}") from e
        matched = [name for name in names if expression.fullmatch(name)]
        if not matched:
            raise UserError(f"{key}: {pattern!r} matches no parameter by its whole path; they are "
                            f"{', '.join(names[:8])}, …; write '.*' around a part of it")  # fmt: skip
        if out.keys() >= set(matched):
            raise UserError(f"{key}: {pattern!r} has no effect: earlier rules match all its parameters; put it first")
        out = dict.fromkeys(matched, value) | out
    return out


def split(text: str) -> list[str]:
    """Splits a comma-separated list of rules."""
    return [part.strip() for part in _COMMA.split(text) if part.strip()]


def _numbers(text: str, key: str) -> list[tuple[str, float]]:
    rules = []
    for part in split(text):
        pattern, _, number = (piece.strip() for piece in part.rpartition("="))
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not pattern or not 0 <= value < float("inf"):
            raise UserError(f"{key}: {part!r} is not PATTERN=NUMBER, a number of 0 or more, such as 'backbone/.*=0.1'")
        rules.append((pattern, value))
    return rules


def layers(names: Sequence[str]) -> dict[str, int]:
    """The layer depth of each parameter, from 0, for layer-wise decay (BEiT; Bao et al. 2021, arXiv:2106.08254).

    `names` are all paths in the order in which the model uses them. A layer is a block: a numbered part of the backbone
    that has modules inside, such as `block3` or `stage2_5`. Parts before the first block are layer 0, one between two
    blocks belongs to the second, and those after the last one (in timm the final norm is in it) and the head form the
    top layer. Without blocks each part is a layer. A LoRA adapter belongs to the layer of its kernel.
    """
    kernels = {name: f"backbone/{match[1]}" for name in names if (match := _ADAPTER.fullmatch(name))}
    matches = {name: match for name in names if name not in kernels and (match := _PART.match(name))}
    parts = {name: match[1] for name, match in matches.items()}
    numbered = {match[1] for match in matches.values() if match[2] and re.search(r"\d", match[1])}
    blocks = numbered or set(parts.values())
    order = list(dict.fromkeys(parts.values()))  # [stem, …, block, between, block, …, after]
    last = max((i for i, part in enumerate(order) if part in blocks), default=-1)
    first = next((i for i, part in enumerate(order) if part in blocks), 0)
    depth, depth_of = int(first > 0), dict.fromkeys(order[:first], 0)
    for part in order[first : last + 1]:
        depth_of[part] = depth
        depth += part in blocks
    depth_of |= dict.fromkeys(order[last + 1 :], depth)
    own = {name: parts.get(kernels.get(name, name)) for name in names}
    return {name: depth if part is None else depth_of[part] for name, part in own.items()}


def parameters_by_module(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The parameters of each module of the backbone and beside it, from all shapes by path; `layer1_*` is a sum."""
    counts = collections.Counter[str]()
    for path, shape in shapes.items():
        module = path.removeprefix("backbone/").split("/")[0]
        counts[re.sub(r"\d+$", "*", module)] += math.prod(shape)
    return dict(counts)
