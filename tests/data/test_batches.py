"""The batches of a stream are the same wherever it starts and whichever host reads them."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow
from cases import thorough
from PIL import Image

from imgclf_jax.core import kinds, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import placement, read_ahead, sampling, sources, stream
from imgclf_jax.data.arrays import array_source
from imgclf_jax.data.source import Source

RANDOM_OPS = "decode(1)|random_resized_crop(6, 5)"


def fake(n=40, shape=(9, 8, 1)):
    return sources.fake(n, shape, 5)["train"]


def train_batches(images, seed, batch_size, start, stop, rows=np.arange, prefetch=4):
    steps = range(start, stop)
    return (batch for _, batch in stream.batches(images, stream.StreamSpec(seed, batch_size), steps, rows, prefetch))


def recorded(source, ids, pause=0):
    """The source, which notes the ids it reads and sleeps for up to `pause` seconds."""

    def read(wanted):
        time.sleep(pause * (len(ids) % 3) / 3)
        ids.extend(wanted.tolist())
        return source.read(wanted)

    return dataclasses.replace(source, read=read)


def assert_same(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype
            np.testing.assert_array_equal(x[name], y[name])


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


@pytest.mark.parametrize("processes", [3, *thorough(2, 12)])
def test_the_rows_of_all_processes_make_the_global_batch(processes):
    """However the rows are divided: here, every second one for each of two processes."""
    images = stream.Images(fake(), RANDOM_OPS, 4)
    whole = list(train_batches(images, 4, 12, 2, 5))
    for process in range(processes):
        rows = np.arange(process, 12, processes)
        expected = [{k: batch[k][rows] for k in ("image", "label")} for batch in whole]
        assert_same(train_batches(images, 4, 12, 2, 5, lambda size, rows=rows: rows), expected)


def test_random_ops_draw_anew_in_every_epoch_and_for_every_seed():
    one = array_source(fake(1, (9, 8, 1)).read(np.zeros(1, np.int64))["image"], np.zeros(1, np.int32), ("a",))
    crops = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):  # of one image, so that each batch is an epoch
        images = stream.Images(one, RANDOM_OPS, seed)
        crops.add(next(train_batches(images, seed, 1, epoch, epoch + 1))["image"].tobytes())
    assert len(crops) == 3


@pytest.mark.parametrize("ops", ["decode(1)", RANDOM_OPS])
def test_a_batch_is_the_same_however_it_is_reached(ops, monkeypatch):
    """From step 0 or directly, with any prefetch, threads or workers, kept or not, with and without TensorFlow."""
    ids = []
    whole = list(train_batches(stream.Images(recorded(fake(), ids), ops, 3), 3, 12, 0, 8))
    assert [b["image"].shape for b in whole] == [(12, 9, 8, 1) if ops == "decode(1)" else (12, 6, 5, 1)] * 8
    assert len(ids) == 16 + (40 if ops == "decode(1)" else 8 * 12)  # the first is read twice at eight positions
    monkeypatch.setattr(stream, "_KEPT_BYTES", 0)
    ways = (1, 1, 3, 1, 0), (0, 3, 1, 4, 0), (5, 0, 1, 1, 0), (3, 0, 7, 9, 0.02)
    for start, workers, threads, prefetch, pause in ways:
        monkeypatch.setattr(stream.machine, "processors", lambda threads=threads: threads)
        images = stream.Images(recorded(fake(), [], pause), ops, 3, workers)
        assert_same(train_batches(images, 3, 12, start, 8, prefetch=prefetch), whole[start:])
        assert not multiprocessing.active_children()
    # Where TensorFlow's import ends when some batches have been read, and where TensorFlow is not installed.
    for module in (tensorflow, None):
        importing: Future = Future()
        monkeypatch.setattr(read_ahead.tensorflow_import, "tensorflow", lambda importing=importing: importing)
        batches = train_batches(images, 3, 12, 2, 8)
        first = [next(batches) for _ in range(2)]
        importing.set_result(module)
        assert_same([*first, *batches], whole[2:])


@pytest.mark.parametrize(("error", "raised", "message"), [
    (UserError("images/30.png: the image does not decode"), UserError, r"^images/30.png: the image does not decode$"),
    (KeyError("thirty"), RuntimeError, "data worker failed(?s:.*)in read(?s:.*)KeyError: 'thirty'"),
    (threading.Lock(), UserError, "data.workers=2: the source, or a host op, cannot be sent to a worker: .*lock"),
    ("killed", UserError, "^data worker [01] ended with status -9; if the machine is out of memory, set fewer"),
])  # fmt: skip
def test_workers_fail_with_a_reason(error, raised, message, monkeypatch):
    """An error while reading ends all of them."""

    def read(ids):
        if 30 in ids:
            raise error
        return {"image": np.zeros((len(ids), 5, 5, 1), np.uint8)}

    monkeypatch.setattr(stream, "_KEPT_BYTES", 0)
    source = Source(40, read, ("a",), "own", np.zeros(40, int))
    batches = stream.eval_batches(stream.Images(source, "decode(1)", 0, 2), 4, prefetch=1)
    assert next(batches)["mask"].all()
    if error == "killed":
        assert next(batches)["mask"].all()
        multiprocessing.active_children()[-1].kill()
    with pytest.raises(raised, match=message):
        list(batches)
    assert not multiprocessing.active_children()


def test_streaming_from_step_ten_million_reads_those_examples_alone():
    ids: list[int] = []
    images = stream.Images(recorded(fake(2**40, (2, 2, 1)), ids), "decode(1)")
    batches = list(train_batches(images, 7, 16, 10**7, 10**7 + 3))
    expected = sampling.position_ids(7, np.arange(10**7 * 16, (10**7 + 3) * 16), 2**40)
    assert sorted(ids[16:]) == sorted(expected.tolist())
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), expected % 5)


@pytest.mark.parametrize("module", [tensorflow, None])
def test_batches_are_read_ahead(module, monkeypatch):
    """At most `prefetch` batches and those in the two threads, while the consumer is slow; a failure is raised."""
    imported: Future = Future()
    imported.set_result(module)
    monkeypatch.setattr(read_ahead.tensorflow_import, "tensorflow", lambda: imported)
    begun = []

    def read(step):
        begun.append(step)
        if step == 20:
            raise UserError("image 20 is broken")
        return {"label": np.full(1, step, np.int32), "more": {"label": np.full(2, step, np.float32)}}

    batches = read_ahead.read_ahead(read, itertools.count(), prefetch=4)
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


@pytest.mark.parametrize(("n", "batch_size", "processes"), [(10, 4, 1), (10, 4, 2), (3, 8, 2), (7, 6, 3), (1, 1, 1)])
def test_evaluation_sees_every_example_once(n, batch_size, processes):
    x = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    images = stream.Images(array_source(x, np.arange(n) * 3, tuple(map(str, range(30)))), "decode(1)")
    rows, steps = np.split(np.arange(batch_size), processes), -(-n // batch_size)
    slices = [list(stream.eval_batches(images, batch_size, own)) for own in rows]
    assert [[len(batch["mask"]) for batch in s] for s in slices] == [[batch_size // processes] * steps] * processes
    joined = {k: np.concatenate([s[i][k] for i in range(steps) for s in slices]) for k in ("image", "label", "mask")}
    np.testing.assert_array_equal(joined["mask"], np.arange(steps * batch_size) < n)  # the padding stands last
    np.testing.assert_array_equal(joined["image"][joined["mask"]].ravel(), np.arange(n))
    np.testing.assert_array_equal(joined["label"][joined["mask"]], np.arange(n) * 3)


def own(image, what):
    """A user's host op with a mistake."""
    if what == "changes":
        image[1:3, 1:3] = 0
    return image.reshape(4) if what == "fails" else image / 255


@pytest.mark.parametrize("image", [np.full((5, 5, 1), 7, np.uint8), Image.new("L", (5, 5), 7)])
def test_a_users_host_op(image):
    source = Source(1, lambda ids: {"image": [image] * len(ids)}, ("a",), "own", np.zeros(1, int))
    for what, message in (("changes", "read-only"), ("fails", "cannot reshape")):  # with the traceback into the op
        with pytest.raises(ValueError, match=message) as e:
            stream.Images(source, f"decode(1)|{__name__}:own({what!r})")
        assert not isinstance(e.value, UserError)
    with pytest.raises(UserError, match=r"returns float64\[5, 5, 1\]; host ops must return uint8"):
        stream.Images(source, f"decode(1)|{__name__}:own('float')")
    batch = stream.Images(source, "decode(1)").read(np.zeros(1, int), np.zeros(1, int))
    assert np.unique(batch["image"]).tolist() == [7]


def counting(image, calls=[0]):  # noqa: B006
    calls[0] += 1
    return image + np.uint8(calls[0])


@kinds.random
def with_numpy(rng, image):
    return image + np.uint8(np.random.randint(100))  # noqa: NPY002


@pytest.mark.parametrize("op", ["counting", "with_numpy"])
def test_an_impure_host_op_is_refused(op):
    """A resumed run would see other images; a cached one depends on when it was decoded."""
    with pytest.raises(UserError, match=rf"^preprocess='decode\(1\)\|{__name__}:{op}', or the source, gives other"):
        stream.Images(fake(), f"decode(1)|{__name__}:{op}")


@pytest.mark.parametrize(("source", "ops", "message"), [
    ("fake(40, (9, 8, 1))", RANDOM_OPS, "is random; use data.placement='host', or move the randomness to augment"),
    (f"fake({2**30}, (256, 256, 3))", "decode(3)", "data.placement='device': 1,073,741,824 decoded images needs 21"),
])  # fmt: skip
def test_what_device_placement_refuses(source, ops, message):
    images = stream.Images(sources.open_splits(source)["train"], ops)
    with pytest.raises(UserError, match=message):
        next(placement.batches("device", images, stream.StreamSpec(5, 24), [0], sharding.make_mesh()))
