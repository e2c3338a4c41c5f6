"""The stream of training batches, a pure function of (seed, step), and padded, masked evaluation batches.

Iterators have no state to save: a run resumes by starting at a step, and a batch is the same on any number of hosts and
threads, and after any restart.
"""

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from imgclf_jax.core import machine, rng, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Batch
from imgclf_jax.data import decode, sampling
from imgclf_jax.data.read_ahead import read_ahead
from imgclf_jax.data.source import DataInfo, Source, read_examples, read_labels

_KEPT_BYTES = 1 << 30  # the largest decoded set to keep in memory
_TRIED = 8  # examples and positions that are read at once, twice
# Mean bytes of an image below which one thread decodes them. Python takes most of the time, and threads hand over the
# GIL for each image: two take 1.4 times as long as one for PNG images of 28 x 28 pixels, half as long for 64 x 64.
_SMALL = 4096


class Images:
    """A source with its host ops applied: ids to fixed-shape uint8 images.

    With deterministic ops and a decoded set of at most 1 GiB, each image is decoded once and kept in memory.
    """

    def __init__(
        self, source: Source, preprocess: str, seed: int = 0, workers: int = 0, sampler: sampling.Sampler | None = None,
        extra: Mapping[str, "Images"] = MappingProxyType({}), bits: int | None = None, key: str = "preprocess",
    ):  # fmt: skip
        """Decodes eight examples twice. Raises UserError for a bad spec, a broken image, and if they differ.

        `workers` processes read ahead, or with 0 threads. `sampler` orders the examples of the stream, by default in
        exact permutations; `extra` are further streams by name. `bits` are those that the run scales deep grey by, by
        default the source's. Errors name `key`.
        """
        self.source, self.seed, self.extra, self.host_ops = source, seed, extra, f"{key}={preprocess!r}"
        self.sampler = sampler or sampling.permutation(source)
        self.bits = source.bits if bits is None else bits
        self._ops, self.random = decode.build(preprocess, self.bits)
        self.workers, self._threads = workers, machine.processors()
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads)
        ids, positions = np.linspace(0, source.size - 1, _TRIED).astype(np.int64), np.arange(_TRIED)
        (first, labels), again = (self._decode(ids, positions, seed) for _ in range(2))
        self.digest = tree.sha256((first, labels))
        if self.digest != tree.sha256(again):
            raise UserError(f"{self.host_ops}, or the source, gives other values in a second call for the "
                            "same example, so no run could be repeated or resumed; draw only from the generator that "
                            "an op with @kinds.random gets")  # fmt: skip
        self.shape: tuple[int, int, int] = first.shape[1:]
        self.kept = not self.random and source.size * first[0].nbytes <= _KEPT_BYTES
        if self.kept:
            self._images = np.empty((source.size, *self.shape), np.uint8)
            self._labels = np.empty((source.size, *labels.shape[1:]), labels.dtype)
            self._decoded = np.zeros(source.size, bool)

    def __len__(self) -> int:
        return self.source.size

    def __getstate__(self) -> dict[str, Any]:  # for a worker process, which has one thread
        return self.__dict__ | {"_pool": None, "_threads": 1, "extra": dict(self.extra)}

    def describe(self, count_classes: bool = False) -> DataInfo:
        """The facts of these training images for the run's record; with `count_classes`, also the class counts."""
        source = self.source
        counts: tuple[int, ...] = ()
        if count_classes:
            counts = tuple(np.bincount(read_labels(source), minlength=len(source.class_names)).tolist())
        extra = {name: images.describe() for name, images in self.extra.items()}
        return DataInfo(source.size, self.shape, source.class_names, source.fingerprint, counts, source.target_names,
                        self.sampler.digest, extra, self.bits)  # fmt: skip

    def read(self, ids: np.ndarray, positions: np.ndarray, seed: int | None = None) -> Batch:
        """Reads {"image": uint8[b, h, w, c], "label": i32[b]} for ids int64[b], or "target" f32[b, k] for "label".

        Positions int64[b] and the seed, by default this object's, key random ops. Raises UserError
        naming the example that does not decode or has another shape.
        """
        key = self.source.label_key
        if not self.kept:
            images, labels = self._decode(ids, positions, self.seed if seed is None else seed)
            return {"image": images, key: labels}
        if (missing := np.unique(ids[~self._decoded[ids]])).size:
            # Threads may race to fill the same rows, but write the same values.
            self._images[missing], self._labels[missing] = self._decode(missing, missing, self.seed)
            self._decoded[missing] = True
        return {"image": self._images.take(ids, 0), key: self._labels[ids]}  # twice as fast as indexing

    def _decode(self, ids: np.ndarray, positions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        examples = read_examples(self.source, ids)
        encoded = examples["image"]

        def decode_one(i: int) -> np.ndarray:
            try:
                return self._ops(encoded[i], seed, int(positions[i]))
            except UserError as e:
                raise UserError(f"{self.source.example_name(int(ids[i]))}: {e}") from e

        nbytes = sum(len(x) if isinstance(x, bytes) else getattr(x, "nbytes", _SMALL) for x in encoded)
        threads = 1 if nbytes < _SMALL * len(ids) else min(self._threads, len(ids))
        shares = np.array_split(np.arange(len(ids)), threads)
        each: Any = self._pool.map if threads > 1 else map
        images = [image for share in each(lambda rows: [decode_one(row) for row in rows], shares) for image in share]
        if wrong := [image for image in images if image.dtype != np.uint8 or image.ndim != 3]:
            raise UserError(f"{self.host_ops} returns {wrong[0].dtype}{list(wrong[0].shape)}; host ops "
                            "must return uint8[h, w, c]; use `augment` for floating point")  # fmt: skip
        shapes = sorted({image.shape for image in images} | {getattr(self, "shape", images[0].shape)})
        if len(shapes) > 1:
            raise UserError(f"{self.host_ops} returns images of different shapes, such as "
                            f"{shapes[0]} and {shapes[1]}; add resize(height, width), or resize_small and "
                            "central_crop")  # fmt: skip
        return np.stack(images), examples[self.source.label_key]


@dataclass(frozen=True)
class StreamSpec:
    """The batches of a run. With several seeds, from `seed` on, a batch has the examples of all of them."""

    seed: int
    batch_size: int  # of one seed, over all hosts
    num_seeds: int = 1
    needs_ids: bool = False  # whether batches also have the `id` and `epoch` of each example, i32
    name: str = ""  # of an extra stream (see `data.extra`), which keys its random draws
    extra: tuple[tuple[str, int], ...] = ()  # (name, batch size) of each extra stream

    @property
    def seeds(self) -> list[int]:
        """The seeds that key the stream, one per replica."""
        own = rng.name_hash(self.name) if self.name else 0
        return [seed ^ own for seed in range(self.seed, self.seed + self.num_seeds)]

    @property
    def extra_streams(self) -> list["StreamSpec"]:
        """The extra streams, which always have ids."""
        return [replace(self, batch_size=b, needs_ids=True, name=name, extra=()) for name, b in self.extra]

    @property
    def rows(self) -> int:
        """The number of examples in a batch, over all seeds."""
        return self.batch_size * self.num_seeds


def batches(
    images: Images, spec: StreamSpec, steps: Iterable[int], rows: Callable[[int], np.ndarray] = np.arange,
    prefetch: int = 4,
) -> Iterator[tuple[int, Batch]]:  # fmt: skip
    """Yields each step with its batch, a pure function of the step.

    A process reads only the rows of each batch that its devices need: `rows` maps a stream's batch size to them,
    int64[b], by default to all. Batches of several seeds are interleaved, [b * num_seeds, …]: the first example of each
    seed, then the second. An extra stream of `spec` is a nested dict, by its name.
    """
    own = images, spec, rows(spec.batch_size)
    extra = {one.name: (images.extra[one.name], one, rows(one.batch_size)) for one in spec.extra_streams}

    def read(step: int) -> Batch:
        return {**_read(step, *own), **{name: _read(step, *stream) for name, stream in extra.items()}}

    kept = all(one.kept for one, *_ in (own, *extra.values()))
    return read_ahead(read, steps, 0 if kept else prefetch, images.workers)


def _read(step: int, images: Images, spec: StreamSpec, rows: np.ndarray) -> Batch:
    """The `rows` of the batch of one stream at a step."""
    positions, replicas = step * spec.batch_size + rows, []
    for seed in spec.seeds:
        ids = images.sampler.ids(seed, positions)
        batch = images.read(ids, positions, seed)
        if spec.needs_ids:
            batch |= {"id": ids.astype(np.int32), "epoch": (positions // images.sampler.epoch).astype(np.int32)}
        replicas.append(batch)
    return {name: interleave([batch[name] for batch in replicas]) for name in replicas[0]}


def interleave(replicas: Sequence[np.ndarray]) -> np.ndarray:
    """Interleaves the examples [b, …] of each replica to [b * replicas, …]."""
    return replicas[0] if len(replicas) == 1 else np.stack(replicas, 1).reshape(-1, *replicas[0].shape[1:])


def eval_batches(images: Images, batch_size: int, rows: np.ndarray | None = None, prefetch: int = 4) -> Iterator[Batch]:
    """Yields every example once, in order. The last batch is padded, where `mask` bool[b] is False.

    With `rows` int64[b], only these rows of each batch.
    """
    rows = np.arange(batch_size, dtype=np.int64) if rows is None else rows

    def read(step: int) -> Batch:
        ids = step * batch_size + rows
        clipped = np.minimum(ids, len(images) - 1)
        return {**images.read(clipped, clipped), "mask": ids < len(images)}

    steps = range(-(-len(images) // batch_size))
    return (batch for _, batch in read_ahead(read, steps, 0 if images.kept else prefetch, images.workers))
