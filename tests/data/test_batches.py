"""The batches of a stream are the same wherever it starts and whichever host reads them."""

import contextlib
import dataclasses
import io
import itertools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow
from cases import thorough
from PIL import Image

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import read_ahead, sampling, sources, stream
from imgclf_jax.data.arrays import array_source
from imgclf_jax.data.source import Source

RANDOM_OPS = "decode(1)|random_resized_crop(6, 5)"


def test_streaming_from_step_ten_million_reads_those_examples_alone():
    ids: list[int] = []
    images = stream.Images(recorded(fake(2**40, (2, 2, 1)), ids), "decode(1)")
    ids.clear()
    batches = list(stream.train_batches(images, 7, 16, 10**7, 10**7 + 3))
    expected = sampling.position_ids(7, np.arange(10**7 * 16, (10**7 + 3) * 16), 2**40)
    assert sorted(ids) == sorted(expected.tolist())
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), expected % 5)


def recorded(source, ids, dawdle=()):
    """The source, which notes the ids it reads and sleeps for each of these times in turn."""
    pauses = itertools.cycle(dawdle or [0])

    def read(wanted):
        time.sleep(next(pauses))
        ids.extend(wanted.tolist())
        return source.read(wanted)

    return dataclasses.replace(source, read=read)


def fake(n=40, shape=(9, 8, 1)):
    return sources.fake(n, shape, 5)["train"]


def assert_same(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype
            np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.parametrize("ops", ["decode(1)", RANDOM_OPS])
def test_a_batch_is_the_same_however_it_is_reached(ops, monkeypatch):
    """From step 0 or directly, with any prefetch and number of threads, with and without TensorFlow."""
    whole = list(stream.train_batches(stream.Images(fake(), ops, seed=3), 3, 12, 0, 8))
    assert [b["image"].shape for b in whole] == [(12, 9, 8, 1) if ops == "decode(1)" else (12, 6, 5, 1)] * 8
    for start, threads, prefetch, dawdle in ((5, 1, 1, ()), (3, 7, 9, (0.02, 0, 0.005)), (7, 3, 2, (0, 0.01))):
        images = stream.Images(recorded(fake(), [], dawdle), ops, 3, threads)
        assert_same(stream.train_batches(images, 3, 12, start, 8, prefetch=prefetch), whole[start:])
    # Where TensorFlow is not installed, and where its import ends when some batches have been read.
    importing: Future = Future()
    monkeypatch.setattr(read_ahead.tensorflow_import, "tensorflow", lambda: importing)
    batches = stream.train_batches(images, 3, 12, 2, 8)
    first = [next(batches) for _ in range(2)]
    importing.set_result(tensorflow)
    assert_same([*first, *batches], whole[2:])
    without_tensorflow(monkeypatch)
    assert_same(stream.train_batches(images, 3, 12, 2, 8), whole[2:])


@pytest.mark.parametrize(("side", "ops", "several"), [
    (28, "decode(1)", False), (80, "decode(1)", True),
])  # fmt: skip
def test_one_thread_decodes_small_files(side, ops, several, monkeypatch):
    """Two would take 1.4 times as long for PNG files of 28 by 28 pixels: they hand over the GIL for each image."""
    rng, files = np.random.default_rng(0), []
    for _ in range(6):
        Image.fromarray(rng.integers(0, 256, (side, side), np.uint8)).save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    images = stream.Images(stored(files), ops, threads=2)
    decode_one, threads, both = images._decode_one, set(), threading.Event()

    def record(*args):
        threads.add(threading.get_ident())
        if len(threads) == 2:
            both.set()
        both.wait(10 if several else 0)
        return decode_one(*args)

    monkeypatch.setattr(images, "_decode_one", record)
    images.read(np.arange(6), np.arange(6))
    assert len(threads) == 1 + several


def stored(images, **more):
    """A source of these images or encoded images."""

    def read(ids):
        return {"image": [images[i] for i in ids], "label": np.zeros(len(ids), np.int32)}

    return Source(**{"size": len(images), "read": read, "class_names": ("a", "b"), "fingerprint": "stored"} | more)


def test_a_source_is_read_in_one_thread_at_a_time():
    """Splits too, which may share a file handle: its seek in one thread moved the read of another."""
    met, meeting = [], None

    def read(ids):
        if meeting:
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait()  # for a second thread in `read`
                met.append(True)
        return {"image": np.zeros((len(ids), 5, 5, 1), np.uint8), "label": np.zeros(len(ids), np.int32)}

    base = {name: Source(4, read, ("a",), name) for name in ("train", "test")}
    splits = [stream.Images(sources.take_split(base, text), "decode(1)") for text in ("train", "test[:50%]")]
    meeting = threading.Barrier(2, timeout=0.3)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda images: images.read(np.arange(2), np.arange(2)), splits))
    assert not met


@pytest.mark.parametrize(("rows", "split"), [(-1, "train"), (1, "train"), (1, "train[:50%]+train[50%:]")])
def test_a_source_that_returns_more_or_fewer_rows_than_ids_is_named(rows, split):
    def read(ids):
        ids = ids[:rows] if rows < 0 else np.append(ids, ids[:rows])
        return {"image": np.zeros((len(ids), 5, 5, 1), np.uint8), "label": np.zeros(len(ids), np.int32)}

    base = {"train": Source(4, read, ("a", "b"), "ragged")}
    with pytest.raises(UserError, match=r"the source's read returns . images for 1 ids; return one per id, in their"):
        stream.Images(sources.take_split(base, split), "decode(1)")


def test_a_source_may_return_pillow_images():
    images = stream.Images(stored([Image.new("L", (6, 5), i) for i in range(3)]), "decode(1)")
    assert images.read(np.arange(3), np.arange(3))["image"][:, 4, 5, 0].tolist() == [0, 1, 2]


def without_tensorflow(monkeypatch):
    missing: Future = Future()
    missing.set_result(None)
    monkeypatch.setattr(read_ahead.tensorflow_import, "tensorflow", lambda: missing)


def no_tensorflow_import(monkeypatch):
    monkeypatch.setattr(read_ahead.tensorflow_import, "tensorflow", lambda: pytest.fail("it imports TensorFlow"))


@pytest.mark.parametrize("cached", [True, False])
def test_only_images_that_are_decoded_again_need_tensorflow(cached, monkeypatch):
    """Its import takes seconds of CPU time, more than training on some thousand images does."""
    if not cached:
        monkeypatch.setattr(stream, "_CACHE_BYTES", 0)
    images, imports = stream.Images(fake(), "decode(1)"), []
    monkeypatch.setattr(read_ahead.tensorflow_import, "tensorflow", lambda: imports.append(1) or Future())
    list(stream.train_batches(images, 0, 12, 0, 2))
    list(stream.eval_batches(images, 12))
    assert len(imports) == (0 if cached else 2)


@pytest.mark.parametrize("by", ["tf.data", "threads without TensorFlow", "threads of kept images"])
def test_batches_are_read_ahead_with_and_without_tensorflow(by, monkeypatch):
    """At most `prefetch` batches and those in the two threads, while the consumer is slow; a failure is raised."""
    kept = by == "threads of kept images"
    if kept:
        no_tensorflow_import(monkeypatch)
    elif by == "threads without TensorFlow":
        without_tensorflow(monkeypatch)
    else:
        read_ahead.tensorflow_import.tensorflow().result()
    begun = []

    def read(step):
        begun.append(step)
        if step == 20:
            raise UserError("image 20 is broken")
        return {"label": np.full(1, step, np.int32), "more": {"label": np.full(2, step, np.float32)}}

    batches = read_ahead.read_ahead(read, itertools.count(), prefetch=4, kept=kept)
    assert [next(batches)[0] for _ in range(2)] == [0, 1]
    until = time.monotonic() + 10
    while len(begun) < 6 and time.monotonic() < until:
        time.sleep(0.01)
    assert 6 <= len(begun) <= 2 + 4 + 2
    for i in range(2, 20):
        step, batch = next(batches)
        assert (step, batch["label"].tolist(), batch["more"]["label"].tolist()) == (i, [i], [i, i])
    with pytest.raises(UserError, match="image 20 is broken"):
        next(batches)


@pytest.mark.parametrize("processes", [3, *thorough(2, 12)])
def test_the_rows_of_all_processes_make_the_global_batch(processes):
    """However the rows are divided: here, every second one for each of two processes."""
    images = stream.Images(fake(), RANDOM_OPS, 4)
    whole = list(stream.train_batches(images, 4, 12, 2, 5))
    for process in range(processes):
        rows = np.arange(process, 12, processes)
        expected = [{k: batch[k][rows] for k in ("image", "label")} for batch in whole]
        assert_same(stream.train_batches(images, 4, 12, 2, 5, rows), expected)


def test_random_ops_draw_anew_in_every_epoch_and_for_every_seed():
    one = array_source(fake(1, (9, 8, 1)).read(np.zeros(1, np.int64))["image"], np.zeros(1, np.int32), ("a",))
    crops = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):  # of one image, so that each batch is an epoch
        images = stream.Images(one, RANDOM_OPS, seed)
        crops.add(next(stream.train_batches(images, seed, 1, epoch, epoch + 1))["image"].tobytes())
    assert len(crops) == 3


def test_the_decoded_cache_changes_nothing_but_the_number_of_decodings(monkeypatch):
    ids: list[int] = []
    source = recorded(fake(), ids)
    cached = stream.Images(source, "decode(1)|resize(6)")
    batches = list(stream.train_batches(cached, 2, 16, 0, 10))
    assert set(ids) == set(range(40))
    ids.clear()
    assert_same(stream.train_batches(cached, 2, 16, 0, 10), batches)
    assert ids == []
    monkeypatch.setattr(stream, "_CACHE_BYTES", 40 * 6 * 6 - 1)
    assert_same(stream.train_batches(stream.Images(source, "decode(1)|resize(6)"), 2, 16, 0, 10), batches)
    assert len(ids) == 1 + 160


@pytest.mark.parametrize(
    ("n", "batch_size", "processes"), [(10, 4, 1), (10, 4, 2), (8, 4, 4), (3, 8, 2), (7, 6, 3), (1, 1, 1)]
)
def test_evaluation_sees_every_example_once(n, batch_size, processes):
    x = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    images = stream.Images(array_source(x, np.arange(n, dtype=np.int32) * 3, tuple(map(str, range(30)))), "decode(1)")
    rows = np.split(np.arange(batch_size), processes)
    slices = [list(stream.eval_batches(images, batch_size, own)) for own in rows]
    steps = -(-n // batch_size)
    assert [len(s) for s in slices] == [steps] * processes
    for s in slices:
        for batch in s:
            assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
                "image": ((batch_size // processes, 1, 1, 1), np.uint8),
                "label": ((batch_size // processes,), np.int32),
                "mask": ((batch_size // processes,), np.bool_),
            }
    joined = {k: np.concatenate([s[i][k] for i in range(steps) for s in slices]) for k in ("image", "label", "mask")}
    np.testing.assert_array_equal(joined["mask"], np.arange(steps * batch_size) < n)  # the padding stands last
    np.testing.assert_array_equal(joined["image"][joined["mask"]].ravel(), np.arange(n))
    np.testing.assert_array_equal(joined["label"][joined["mask"]], np.arange(n) * 3)


def cut_out(image):
    image[1:3, 1:3] = 0
    return image


def of_no_size(image):
    return np.zeros((2, 3)).reshape(5)


@pytest.mark.parametrize("form", ["array", "png"])
def test_a_users_host_op_cannot_change_the_source(form):
    """It changed an example for all later epochs, if `read` returns views of an array."""
    image = np.full((5, 5, 1), 7, np.uint8)
    if form == "png":
        Image.fromarray(image[..., 0]).save(file := io.BytesIO(), "PNG")
    given = image if form == "array" else file.getvalue()
    with pytest.raises(ValueError, match="read-only"):
        stream.Images(stored([given]), f"decode(1)|{__name__}:cut_out")
    assert (image == 7).all()
    with pytest.raises(ValueError, match="cannot reshape"):  # the op's own error, with its traceback
        stream.Images(stored([given]), f"decode(1)|{__name__}:of_no_size")


def to_float(image):
    return image.astype(np.float32) / 255


def test_a_users_host_op_that_does_not_give_uint8_is_refused():
    """Values in [0, 1] would all become 0 as uint8."""
    with pytest.raises(UserError, match=r"returns float32\[9, 8, 1\]; host ops must return uint8"):
        stream.Images(fake(), f"decode(1)|{__name__}:to_float")
