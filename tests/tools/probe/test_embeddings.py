"""Files of features: reading returns what was written, however it was split into parts."""

import numpy as np
import pytest

from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.probe import embeddings

RNG = np.random.default_rng(0)
NAMES = ["\udcff.png", *(f"a/{i}.png" for i in range(10))]  # a file's name may hold any bytes
LABELS = np.array([0, 1, -1, 2, 0, 1, 1, 2, 0, -1, 2], np.int32)
CLASSES = ("cat", "dog", "größer")


def write(path, features):
    """In three parts, from two sets."""
    found = embeddings.Embeddings()
    for name, some in (("test", slice(0, 4)), ("test", slice(4, 5)), ("other", slice(5, 11))):
        found.add(name, NAMES[some], LABELS[some], features[:, some])
    found.write(path, CLASSES)


@pytest.mark.parametrize("seeds", [1, 3])
def test_npz(tmp_path, seeds):
    features = RNG.normal(size=(seeds, 11, 5)).astype(np.float32)
    write(tmp_path / "a.npz", features)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["features"], features if seeds > 1 else features[0])
        np.testing.assert_array_equal(file["labels"], LABELS)
        assert file["features"].dtype == np.float32
        assert file["labels"].dtype == np.int32
        assert file["names"].tolist() == [r"\udcff.png", *NAMES[1:]]
        assert file["sets"].tolist() == ["test"] * 5 + ["other"] * 6
        assert tuple(file["class_names"].tolist()) == CLASSES
    assert [f.name for f in tmp_path.iterdir()] == ["a.npz"]


def test_no_images(tmp_path):
    (tmp_path / "a.npz").write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*: no image has features"):
        embeddings.Embeddings().write(tmp_path / "a.npz", CLASSES)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a.npz", "old")]
