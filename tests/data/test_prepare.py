"""TFDS data sets: prepared as ArrayRecord from original files, and the errors on the way."""

import gzip
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_sources import everything

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode, prepare, sources


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """27 small images that need no download."""

    VERSION = tfds.core.Version("1.2.0")

    LABEL = tfds.features.ClassLabel(names=["cat", "dog", "emu"])
    FEATURES = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(5, 4, 3)), "label": LABEL})

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=self.FEATURES)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 20), "test": self._generate_examples(20, 27)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            # The last one has no label, as in a test set whose labels are secret.
            yield i, {"image": picture(i), "label": -1 if i == 26 else i % 3}


class TinyPairs(TinyPictures):
    """Two images instead of one image and a label."""

    FEATURES = tfds.features.FeaturesDict({"a": tfds.features.Image(), "b": tfds.features.Image()})


def picture(i):
    return np.random.default_rng(i).integers(0, 256, (5, 4, 3), np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    return sources.open_splits("tfds('tiny_pictures')", data_dir=data_dir), data_dir


def test_tfds_examples_are_read_in_any_order_still_encoded(tiny):
    base, data_dir = tiny
    assert {name: s.size for name, s in base.items()} == {"train": 20, "test": 7}
    assert list(Path(data_dir).rglob("*train.array_record*"))
    assert base["train"].class_names == ("cat", "dog", "emu")
    which = {picture(i).tobytes(): i for i in range(27)}  # TFDS shuffles when it prepares
    ids = np.array([13, 0, 19, 13, 5])
    whole, some = everything(base["train"]), base["train"].read(ids)
    assert some["image"] == [whole["image"][i] for i in ids]
    assert all(image.startswith(b"\x89PNG") for image in whole["image"])
    examples = [which[decode.decode(image).tobytes()] for image in whole["image"]]
    assert sorted(examples) == list(range(20))
    np.testing.assert_array_equal(whole["label"], np.array(examples) % 3)
    np.testing.assert_array_equal(some["label"], whole["label"][ids])
    before = {p: p.stat().st_mtime_ns for p in Path(data_dir).rglob("*")}
    again = sources.open_splits(f"tfds('tiny_pictures:1.2.0', data_dir={data_dir!r})")
    assert {p: p.stat().st_mtime_ns for p in Path(data_dir).rglob("*")} == before
    assert again["train"].fingerprint == base["train"].fingerprint != base["test"].fingerprint


def test_an_example_without_a_label_is_named(tiny):
    with pytest.raises(UserError, match=r"example \d of 'tiny_pictures/1.2.0 test .* has no label; use another split"):
        everything(tiny[0]["test"])


@pytest.mark.parametrize(("name", "message"), [
    ("tiny_picture", "unknown TFDS data set 'tiny_picture': did you mean 'tiny_pictures'"),
    ("tiny_pictures:9.9.9", "cannot be loaded at version 9.9.9"),
    ("tiny_pairs", "has ['a', 'b']; image classification needs image and label"),
])  # fmt: skip
def test_tfds_names_that_cannot_be_used(tmp_path, name, message):
    with pytest.raises(UserError) as e:
        sources.open_splits(f"tfds({name!r})", data_dir=str(tmp_path))
    assert message in str(e.value)


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(prepare, "_RETRIES", 0)
    [monkeypatch.delenv(name) for name in list(os.environ) if name.lower().endswith("_proxy")]


FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def test_without_a_network_the_files_and_manual_dir_are_named(tmp_path, no_network):
    (tmp_path / FILES[0]).write_bytes(b"")
    for manual_dir, missing in (("", FILES), (str(tmp_path), FILES[1:])):
        with pytest.raises(UserError) as e:
            sources.open_splits("tfds('fashion_mnist')", data_dir=str(tmp_path / "data"), manual_dir=manual_dir)
        assert "TFDS could not prepare 'fashion_mnist'" in str(e.value)
        assert "put them in one directory and pass it as --config.data.manual_dir: http" in str(e.value)
        listed = str(e.value).rpartition("manual_dir: ")[2]
        assert [f for f in FILES if f"/{f}" in listed] == missing


def test_a_damaged_file_in_manual_dir_is_named(tmp_path, no_network):
    for file in FILES:
        (tmp_path / file).write_bytes(gzip.compress(b"not the original"))
    with pytest.raises(UserError, match=r"could not prepare 'fashion_mnist' .*-ubyte\.gz.* has wrong checksum"):
        sources.open_splits("tfds('fashion_mnist')", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path))
