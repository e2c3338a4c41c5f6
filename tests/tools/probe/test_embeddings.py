"""Files of features: reading returns what was written, however it was split into parts."""

import tracemalloc

import numpy as np
import pytest

from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.probe import embeddings

RNG = np.random.default_rng(0)
NAMES = [f"a/{'x' * (i % 5)}{i}.png" for i in range(11)]
LABELS = np.array([0, 1, -1, 2, 0, 1, 1, 2, 0, -1, 2], np.int32)
CLASSES = ("cat", "dog", "größer")


def write(path, features):
    """In three parts, from two sets."""
    with embeddings.writing(path, CLASSES) as add:
        for of, some in (("test", slice(0, 4)), ("test", slice(4, 5)), ("other", slice(5, 11))):
            add(of, NAMES[some], LABELS[some], features[:, some])


@pytest.mark.parametrize("seeds", [1, 3])
def test_npz(tmp_path, monkeypatch, seeds):
    monkeypatch.setattr(embeddings, "_CHUNK", 100)  # so that names are written in several parts
    features = RNG.normal(size=(seeds, 11, 5)).astype(np.float32)
    write(tmp_path / "a.npz", features)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["features"], features if seeds > 1 else features[0])
        np.testing.assert_array_equal(file["labels"], LABELS)
        assert file["features"].dtype == np.float32
        assert file["labels"].dtype == np.int32
        assert file["names"].tolist() == NAMES
        assert file["sets"].tolist() == ["test"] * 5 + ["other"] * 6
        assert tuple(file["class_names"].tolist()) == CLASSES
    assert [f.name for f in tmp_path.iterdir()] == ["a.npz"]


def test_memory_does_not_grow_with_the_features(tmp_path):
    """40 MB of them are written with 10 MB of memory."""
    part = np.ones((1, 500, 1000), np.float32)  # 2 MB
    tracemalloc.start()
    with embeddings.writing(tmp_path / "a.npz", CLASSES) as add:
        for _ in range(20):
            add("test", ["1.png"] * 500, np.zeros(500, np.int32), part)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 40e6
    assert peak < 10e6


def test_after_an_error_the_file_is_as_it_was(tmp_path):
    (tmp_path / "a.npz").write_text("old")

    def fail():
        with embeddings.writing(tmp_path / "a.npz", CLASSES) as add:
            add("test", NAMES[:1], LABELS[:1], np.ones((1, 1, 2), np.float32))
            _ = 1 / 0

    def add_nothing():
        with embeddings.writing(tmp_path / "a.npz", CLASSES):
            pass

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(UserError, match=r"cannot write .*: no image has features"):
        add_nothing()
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a.npz", "old")]


def test_names_that_are_no_utf_8(tmp_path):
    name = b"\xff.png".decode("utf-8", "surrogateescape")
    with embeddings.writing(tmp_path / "a.npz", CLASSES) as add:
        add("", [name], LABELS[:1], np.ones((1, 1, 2), np.float32))
    assert np.load(tmp_path / "a.npz")["names"].tolist() == [r"\udcff.png"]
