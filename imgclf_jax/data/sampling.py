"""Which example stands at each position of the stream: a pure function of (seed, position).

A sampler has no state. The ids at positions int64[b] depend on nothing but the seed and these positions, so a batch is
the same on any number of hosts and after any restart, whatever the sampling.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from imgclf_jax import config as configs
from imgclf_jax.core import rng, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.data.arrays import load_array

_ROUNDS = 6
_RANKED = 32
_PROBED = 20_000  # positions over which the frequencies of a user's own sampling are counted

Ids = Callable[[int, np.ndarray], np.ndarray]  # (seed, positions int64[b]) → ids int64[b]


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): a bijection of uint64 whose every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, name: str, *counters: np.ndarray) -> np.ndarray:
    """A key uint64[b] for each row of the counters, int64[b] each, of the stream `name`."""
    key = np.array([(seed << 32) | rng.name_hash(name)], np.uint64)
    for counter in counters:
        key = _mix(key + _mix(counter.astype(np.uint64)))
    return key


def _side(n: int) -> int:
    return max(16, math.isqrt(n - 1) + 1)


def permute(x: np.ndarray, n: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """The image of each x, int64[b], under the permutation of [0, n) that its key, uint64[b] or uint64[1], names.

    n is one number, or one for each x, int64[b].
    A Feistel network over Z_a × Z_a, a = ceil(sqrt(n)), walked until it lands below n (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"): any element costs the same, and nothing of size n is made.
    """
    if isinstance(n, np.ndarray):
        sizes, which = np.unique(n, return_inverse=True)
        a, below = np.array([_side(int(size)) for size in sizes], np.uint64)[which], n.astype(np.uint64)
    else:
        a, below = np.array([_side(n)], np.uint64), np.array([n], np.uint64)
    keys = [_mix(key + np.uint64(r)) for r in range(_ROUNDS)]
    out = x.astype(np.uint64)
    todo = np.arange(out.size)

    def own(values: np.ndarray) -> np.ndarray:
        return values if values.size == 1 else values[todo]

    while todo.size:
        side = own(a)
        left, right = np.divmod(out[todo], side)
        for k in keys:
            left, right = right, (left + _mix(right + own(k)) % side) % side
        out[todo] = left * side + right
        todo = todo[out[todo] >= own(below)]
    return out.astype(np.int64)


def shuffle(x: np.ndarray, n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """As `permute`, with n int64[b] and key uint64[b], and as fast for small n.

    Over few elements a Feistel network walks long: there the permutation is the order of n hashes. Elements that share
    a key share their n.
    """
    out, few = np.empty(x.shape, np.int64), n <= _RANKED
    out[~few] = permute(x[~few], n[~few], key[~few])
    keys, first, which = np.unique(key[few], return_index=True, return_inverse=True)
    column = np.arange(_RANKED)
    hashes = _mix(keys[:, None] + _mix(column.astype(np.uint64) + np.uint64(1)))  # [keys, 32]
    hashes[column >= n[few][first][:, None]] = np.iinfo(np.uint64).max
    out[few] = np.argsort(hashes, 1, kind="stable")[which, x[few]]
    return out


def example_ids(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """The ids int64[batch_size] of the examples in the batch at `step`, of n examples, with sampling 'permutation'.

    Global position g = step * batch_size + i, epoch g // n, and the id is the place of g % n in a permutation keyed
    by (seed, epoch). So every epoch is an exact permutation, whatever the batch size, and any step costs the same.
    """
    return position_ids(seed, np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64), n)


def position_ids(seed: int, positions: np.ndarray, n: int) -> np.ndarray:
    """The ids at global stream positions, both int64[b], with sampling 'permutation'."""
    epoch, place = np.divmod(positions, n)
    if epoch.size and (epoch == epoch[0]).all():
        epoch = epoch[:1]  # one key for all
    return permute(place, n, _keys(seed, "order", epoch))


@dataclass(frozen=True)
class Sampler:
    """What `data.sampling` names."""

    ids: Ids
    epoch: int  # positions in an epoch of the stream: the number in a batch's `epoch` is position // epoch
    digest: str = ""  # of the numbers that it samples by, beside the data themselves
    # (positions) → f64[n]: how often each example is expected at the first so many positions; None: to be counted.
    expected: Callable[[int], np.ndarray] | None = None


@dataclass(frozen=True)
class Given:
    """What a sampling is made for."""

    source: sources.Source
    batch_size: int  # for durations in steps

    @property
    def n(self) -> int:
        """The number of examples."""
        return len(self.source)


def permutation(given: Given) -> Sampler:
    """Every example once an epoch, in an order drawn anew for each."""
    n = given.n
    return Sampler(lambda seed, at: position_ids(seed, at, n), n, "", lambda stop: np.full(n, stop / n))


def balanced(given: Given) -> Sampler:
    """Every class equally often: k consecutive positions, from a multiple of k on, hold each of the k classes once.

    The turns of a class go through its examples in exact permutations. An epoch of the stream ends when the largest
    class has been gone through once. Classes without examples are left out. Raises UserError for targets.
    """
    if sources.target_names(given.source):
        raise UserError("balancing needs labels, and data.source gives targets")
    labels = sources.read_labels(given.source)
    counts = np.bincount(labels)
    present = np.flatnonzero(counts)
    order, starts, k = np.argsort(labels, kind="stable"), np.cumsum(counts) - counts, len(present)

    def ids(seed: int, positions: np.ndarray) -> np.ndarray:
        turn, place = np.divmod(positions, k)
        classes = present[shuffle(place, np.full(place.shape, k), _keys(seed, "classes", turn))]
        passes, at = np.divmod(turn, counts[classes])
        return order[starts[classes] + shuffle(at, counts[classes], _keys(seed, "balanced", classes, passes))]

    return Sampler(ids, k * int(counts.max()), "", lambda stop: stop / k / counts[labels])


def weighted(given: Given, by: str = "") -> Sampler:
    """Each position draws an example with a probability proportional to its weight, independently of all others.

    `by` is a file .npy or .npz with a weight for each example, or the name of a column of the source; else the weights
    are the source's own. An epoch of the stream has as many positions as there are examples.
    """
    weights, what = _numbers(given, by)
    if (weights < 0).any():
        i = int(np.argmax(weights < 0))
        raise UserError(f"{what} is {weights[i]} for {_name(given, i)}; a weight is 0 or more")
    with np.errstate(over="ignore"):
        total = np.cumsum(weights)
    if not 0 < total[-1] < np.inf:
        raise UserError(f"{what} adds up to {total[-1]}; at least one weight must be above 0, and their sum finite")

    def ids(seed: int, positions: np.ndarray) -> np.ndarray:
        bits = _keys(seed, "weighted", positions) >> np.uint64(11)
        return np.searchsorted(total, bits * (2.0**-53 * total[-1]), side="right")

    return Sampler(ids, given.n, _digest(weights), lambda stop: stop * weights / total[-1])


def repeated(given: Given, times: int) -> Sampler:
    """Every example at `times` positions in a row, each augmented on its own.

    This is repeated augmentation (Hoffer et al. 2019, "Augment your batch"). Position g holds what position g // times
    of 'permutation' holds; an epoch of the stream has times * n positions.
    """
    if type(times) is not int or times < 1:
        raise UserError(f"times={times!r} must be a whole number from 1 on")
    n = given.n
    return Sampler(
        lambda seed, at: position_ids(seed, at // times, n), times * n, "", lambda stop: np.full(n, stop / n)
    )


def curriculum(
    given: Given, scores: str, start: float = 0.04, increase: float = 1.9, every: str = "1 epochs"
) -> Sampler:
    """Easy examples first: the fixed exponential pacing of Hacohen and Weinshall (2019, "On the power of curriculum
    learning", section 3).

    `scores`, a file or a column as in `weighted`, says how hard each example is. Stage s = 0, 1, … draws from the
    ceil(start * increase**s * n) examples of the lowest scores, in exact permutations of these, and lasts for the
    duration `every`. The first stage that has all n examples is the last one, and never ends.
    """
    if not 0 < start <= 1 or not 1 < increase < np.inf:
        raise UserError(f"start={start!r} must be above 0 and at most 1, and increase={increase!r} above 1")
    values, _ = _numbers(given, scores)
    order, n = np.argsort(values, kind="stable"), given.n
    steps = configs.period(str(every), "every", n, given.batch_size)
    if steps is None:
        raise UserError("every='' must be a duration, such as '1 epochs' or '100 steps'")
    length, found = max(1, math.ceil(steps * given.batch_size)), [0]
    while found[-1] < n:
        found.append(min(n, math.ceil(start * increase ** (len(found) - 1) * n)))
    sizes = np.array(found[1:])

    def ids(seed: int, positions: np.ndarray) -> np.ndarray:
        stage = np.minimum(positions // length, len(sizes) - 1)
        passes, at = np.divmod(positions - stage * length, sizes[stage])
        return order[shuffle(at, sizes[stage], _keys(seed, "curriculum", stage, passes))]

    def expected(stop: int) -> np.ndarray:
        drawn = np.zeros(n)
        for s, size in enumerate(sizes):
            left = max(0, stop - s * length)
            drawn[order[:size]] += (left if s == len(sizes) - 1 else min(length, left)) / size
        return drawn

    return Sampler(ids, n, _digest(values), expected)


def subset(given: Given, ids: str) -> Sampler:
    """The examples whose ids a .npy or .npz file holds: each exactly once in an epoch of the stream."""
    chosen, n = load_array(ids, ("ids",)), given.n
    if chosen.ndim != 1 or not chosen.size or chosen.dtype.kind not in "iu":
        raise UserError(f"{ids} holds {chosen.dtype}{list(chosen.shape)}; expected whole numbers [m], m above 0")
    if wrong := [int(i) for i in chosen if not 0 <= i < n]:
        raise UserError(f"{ids} holds the id {wrong[0]}, and the split has {n} examples, 0 to {n - 1}")
    chosen = chosen.astype(np.int64)
    if len(np.unique(chosen)) < len(chosen):
        twice = int(np.argmax(np.bincount(chosen)))
        raise UserError(f"{ids} holds the id {twice} more than once; use weighted(…) for examples that come more often")
    m = len(chosen)

    def of_positions(seed: int, positions: np.ndarray) -> np.ndarray:
        epoch, place = np.divmod(positions, m)
        return chosen[shuffle(place, np.full(place.shape, m), _keys(seed, "subset", epoch))]

    return Sampler(of_positions, m, _digest(chosen),
                   lambda stop: np.bincount(chosen, minlength=n) * (stop / m))  # fmt: skip


SAMPLINGS = {"permutation": permutation, "balanced": balanced, "weighted": weighted, "repeated": repeated,
             "curriculum": curriculum, "subset": subset}  # fmt: skip


def _bind(text: str) -> tuple[spec.Call, Any]:
    call = spec.parse_one(text)
    if ":" not in call.name:
        return call, spec.bind(call, SAMPLINGS, "sampling", ("given",))
    factory = spec.takes(spec.lookup(call, SAMPLINGS, "sampling"), "source")
    return call, spec.bind(call, SAMPLINGS, "sampling", ("source",) if factory else ("key", "positions", "n"))


def check_name(text: str) -> None:
    """Raises UserError for a sampling that names nothing, or whose arguments do not fit, before the data are opened."""
    _bind(text)


def build(text: str, given: Given, key: str = "data.sampling") -> Sampler:
    """The sampler of a spec, for a split. Raises UserError naming `key`, the config key, for what does not fit it.

    A user's own is a function `(key uint64, positions int64[b], n, …) -> ids int64[b]`, or a factory `(source, …)` that
    gives a function `(key, positions, n)`, whose attribute `epoch`, if any, is the length of an epoch of the stream.
    """
    call, make = _bind(text)
    where = f"{key}={text!r}"
    try:
        if ":" not in call.name:
            return make(given)
        function = make(given.source) if spec.takes(make.func, "source") else make
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    return _own(function, given.n, where)


def _own(function: Callable[..., Any], n: int, where: str) -> Sampler:
    def ids(seed: int, positions: np.ndarray) -> np.ndarray:
        found = np.asarray(function(_keys(seed, "sampling")[0], positions.copy(), n))
        if found.shape != positions.shape or found.dtype.kind not in "iu":
            raise UserError(f"{where} gives {found.dtype}{list(found.shape)} for {len(positions)} positions; expected "
                            "a whole number for each")  # fmt: skip
        if wrong := np.flatnonzero((found < 0) | (found >= n)).tolist():
            raise UserError(f"{where} gives the id {found[wrong[0]]} at position {positions[wrong[0]]}, and the split "
                            f"has {n} examples, 0 to {n - 1}")  # fmt: skip
        return found.astype(np.int64)

    probe = np.concatenate([np.arange(64), 10**9 + np.arange(64)])
    whole = ids(0, probe)
    if not (np.array_equal(ids(0, probe[::2]), whole[::2]) and np.array_equal(ids(0, probe[1::2]), whole[1::2])):
        raise UserError(f"{where} gives other ids for the same positions in another call, or beside other positions; "
                        "an id must follow from the key and its position alone")  # fmt: skip
    return Sampler(ids, int(getattr(function, "epoch", n)))


def _numbers(given: Given, by: str) -> tuple[np.ndarray, str]:
    """(a number for each example, f64[n], what they are called in errors). Raises UserError for NaN and infinity."""
    if by.endswith((".npy", ".npz")):
        values, what = load_array(by, ("weights", "scores")), by
    else:
        values, what = sources.read_column(given.source, by), f"the column {by!r}" if by else "the source's weights"
    if values.shape != (given.n,) or values.dtype.kind not in "fiub":
        raise UserError(f"{what} holds {values.dtype}{list(values.shape)}; expected a real number for each of the "
                        f"{given.n} examples of the split")  # fmt: skip
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        i = int(np.argmin(np.isfinite(values)))
        raise UserError(f"{what} is {values[i]} for {_name(given, i)}; expected finite numbers")
    return values, what


def _name(given: Given, i: int) -> str:
    name: str = getattr(given.source, "name", "example {}".format)(i)
    return name


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(str(values.dtype).encode() + np.ascontiguousarray(values).data).hexdigest()


def describe(sampler: Sampler, source: sources.Source, positions: int) -> str:
    """A line that says how often each class is expected at the first so many positions of the stream."""
    said = f"an epoch of the stream has {sampler.epoch:,} examples"
    labels = sources.labels_at_hand(source)
    if labels is None:
        return said
    if sampler.expected:
        drawn = sampler.expected(positions)
    else:
        probed = min(positions, _PROBED)
        ids = sampler.ids(0, np.arange(probed))
        drawn = np.bincount(ids, minlength=len(source)) * (positions / probed)
    by_class = np.bincount(labels, drawn, len(source.class_names))
    order = np.argsort(-by_class.round(3), kind="stable")
    shown = [f"{source.class_names[c]} {by_class[c]:,.0f}" for c in order]
    if len(shown) > 10:
        shown = [*shown[:5], "…", *shown[-5:]]
    return f"{said}; expected in the run, by class: {', '.join(shown)}"
