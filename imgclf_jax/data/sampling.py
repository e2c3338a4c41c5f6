"""Sampling: the example id at each stream position, as a pure function of (seed, position).

A sampler has no state. The ids at positions int64[b] depend only on the seed and these positions, so a batch is
the same on any number of hosts and after any restart.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from imgclf_jax.core import rng, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Function
from imgclf_jax.data.arrays import load_array
from imgclf_jax.data.source import Source, read_labels, to_numbers

_ROUNDS = 6  # of the Feistel network
_RANKED = 32  # the most elements to permute by ranking hashes
_RECORDED = 2**20  # positions of the first epoch, at most, by whose ids a run recognizes a user's sampling

type Ids = Callable[[int, np.ndarray], np.ndarray]  # (seed, positions int64[b]) → ids int64[b]


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): a bijection of uint64 that mixes every bit into every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, name: str, *counters: np.ndarray) -> np.ndarray:
    """Keys uint64[b] of the stream `name`, one per row of the counters, int64[b] each."""
    key = np.array([(seed << 32) | rng.name_hash(name)], np.uint64)
    for counter in counters:
        key = _mix(key + _mix(counter.astype(np.uint64)))
    return key


def permute(x: np.ndarray, n: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permutes each x, int64[b], by the permutation of [0, n) with its key, uint64[b] or uint64[1].

    n is one number, or one per x, int64[b]. This is a Feistel network over Z_a × Z_a, a = ceil(sqrt(n)), with cycle
    walking until it lands below n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"), in O(1) memory.
    """
    below = np.atleast_1d(n).astype(np.uint64)
    sizes, which = np.unique(below, return_inverse=True)
    a = np.array([max(16, math.isqrt(int(size) - 1) + 1) for size in sizes], np.uint64)[which]
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
    """`permute` with n int64[b] and key uint64[b], and fast for small n too.

    Cycle walking takes long over few elements: n hashes order these. Elements that share a key must share their n.
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
    """The ids int64[batch_size] of the batch at `step`, out of n examples, with sampling 'permutation'.

    At global position g = step * batch_size + i, the epoch is g // n, and the id is g % n under a permutation keyed by
    (seed, epoch). Every epoch is an exact permutation, whatever the batch size, and any step costs the same.
    """
    return position_ids(seed, np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64), n)


def position_ids(seed: int, positions: np.ndarray, n: int) -> np.ndarray:
    """The ids at global stream positions, both int64[b], with sampling 'permutation'."""
    epoch, index = np.divmod(positions, n)
    if epoch.size and (epoch == epoch[0]).all():
        epoch = epoch[:1]  # one key for all
    return permute(index, n, _keys(seed, "order", epoch))


@dataclass(frozen=True)
class Sampler:
    """A sampling of one split."""

    ids: Ids
    epoch: int  # positions in an epoch of the stream: a batch's `epoch` is position // epoch
    digest: str = ""  # of the numbers that it samples by, besides the data, or of what a user's own returns


def permutation(source: Source) -> Sampler:
    """Every example once per epoch, in a new random order each time."""
    n = source.size
    return Sampler(lambda seed, positions: position_ids(seed, positions, n), n)


def balanced(source: Source) -> Sampler:
    """Every class equally often: positions k i to k i + k - 1 hold each of the k classes once.

    The examples of a class come in exact permutations. An epoch of the stream ends when the largest class has been seen
    once. Classes without examples are skipped. Raises UserError for targets.
    """
    labels = read_labels(source)
    counts = np.bincount(labels)
    present = np.flatnonzero(counts)
    order, starts, k = np.argsort(labels, kind="stable"), np.cumsum(counts) - counts, len(present)

    def ids(seed: int, positions: np.ndarray) -> np.ndarray:
        turn, slot = np.divmod(positions, k)
        classes = present[shuffle(slot, np.full(slot.shape, k), _keys(seed, "classes", turn))]
        passes, index = np.divmod(turn, counts[classes])
        return order[starts[classes] + shuffle(index, counts[classes], _keys(seed, "balanced", classes, passes))]

    return Sampler(ids, k * int(counts.max()))


def weighted(source: Source, by: str = "weight") -> Sampler:
    """Draws the example at each position independently, with a probability proportional to its weight.

    `by` is a column of the source, or a .npy file of a weight per example. An epoch has as many positions as examples.
    """
    if str(by).endswith(".npy"):
        weights = load_array(by)
    elif by in source.columns:
        weights = to_numbers(by, source.columns[by])
    else:
        raise UserError(f"data.source has no column {by!r} among {sorted(source.columns)}; name one, or a file of "
                        "numbers, such as 'weights.npy'")  # fmt: skip
    if weights.shape != (source.size,) or weights.dtype.kind not in "fiub":
        raise UserError(f"{by} holds {weights.dtype}{list(weights.shape)}; expected a real number for each of the "
                        f"{source.size} examples of the split")  # fmt: skip
    weights = weights.astype(np.float64)
    with np.errstate(over="ignore"):
        total = np.cumsum(weights)
    if not (np.all(weights >= 0) and 0 < total[-1] < np.inf):
        raise UserError(f"the weights in {by} are from {weights.min()} to {weights.max()}, with the sum {total[-1]}; "
                        "each must be 0 or more, and the sum finite and above 0")  # fmt: skip

    def ids(seed: int, positions: np.ndarray) -> np.ndarray:
        bits = _keys(seed, "weighted", positions) >> np.uint64(11)
        return np.searchsorted(total, bits * (2.0**-53 * total[-1]), side="right")

    return Sampler(ids, source.size, _digest(weights))


def subset(source: Source, ids: str) -> Sampler:
    """The examples whose ids are in a .npy file, each exactly once per epoch of the stream."""
    chosen, n = load_array(str(ids)), source.size
    if chosen.ndim != 1 or not chosen.size or chosen.dtype.kind not in "iu":
        raise UserError(f"{ids} holds {chosen.dtype}{list(chosen.shape)}; expected whole numbers [m], m above 0")
    if not 0 <= chosen.min() <= chosen.max() < n:
        raise UserError(f"{ids} has ids from {chosen.min()} to {chosen.max()}, but the split has 0 to {n - 1}")
    chosen = chosen.astype(np.int64)
    if len(np.unique(chosen)) < len(chosen):
        raise UserError(f"{ids} has an id more than once; use weighted(…) for unequal frequencies")
    m = len(chosen)

    def ids_at(seed: int, positions: np.ndarray) -> np.ndarray:
        epoch, index = np.divmod(positions, m)
        return chosen[shuffle(index, np.full(index.shape, m), _keys(seed, "subset", epoch))]

    return Sampler(ids_at, m, _digest(chosen))


SAMPLINGS = {"permutation": permutation, "balanced": balanced, "weighted": weighted, "subset": subset}


def bind(text: str) -> tuple[spec.Call, functools.partial[Any]]:
    """Binds the arguments of a sampling. Raises UserError if it names nothing or they do not fit. Opens no data."""
    call = spec.parse_one(text)
    factory = ":" not in call.name or spec.takes(spec.lookup(call, SAMPLINGS, "sampling"), "source")
    return call, spec.bind(call, SAMPLINGS, "sampling", ("source",) if factory else ("key", "positions", "n"))


def build(text: str, source: Source, key: str = "data.sampling") -> Sampler:
    """Returns the sampler that a spec names, for a split. Raises UserError naming the config key `key`.

    A user's own is a function `(key uint64, positions int64[b], n, …) -> ids int64[b]`, or a factory `(source, …)` that
    returns a function `(key, positions, n)`. The function's attribute `epoch`, if any, is the length of an epoch of the
    stream. The digest covers the ids of the first epoch and of a position in each later one, whatever they follow from.
    """
    call, make = bind(text)
    where = f"{key}={text!r}"
    try:
        made: Any = make(source) if spec.takes(make.func, "source") else make
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    return made if ":" not in call.name else _user_sampler(made, source.size, where)


def _user_sampler(function: Function, n: int, where: str) -> Sampler:
    def ids(seed: int, positions: np.ndarray) -> np.ndarray:
        out = np.asarray(function(_keys(seed, "sampling")[0], positions.copy(), n))
        if out.shape != positions.shape or out.dtype.kind not in "iu":
            raise UserError(f"{where} returns {out.dtype}{list(out.shape)} for {len(positions)} positions; return a "
                            "whole number for each")  # fmt: skip
        if wrong := out[(out < 0) | (out >= n)].tolist():
            raise UserError(f"{where} returns the id {wrong[0]}, but the split has 0 to {n - 1}")
        return out.astype(np.int64)

    epoch = int(spec.declared(function, "epoch", n))
    probe = np.concatenate([np.arange(min(epoch, _RECORDED)), (epoch + 1) * np.arange(1, 4096)])
    together = ids(0, probe)
    if not all(np.array_equal(ids(0, probe[i::2]), together[i::2]) for i in range(2)):
        raise UserError(f"{where} returns other ids for the same positions in another call; an id must depend only on "
                        "the key and its position")  # fmt: skip
    return Sampler(ids, epoch, _digest(together))


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(str(values.dtype).encode() + np.ascontiguousarray(values).data).hexdigest()
