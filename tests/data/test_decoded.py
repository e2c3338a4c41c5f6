"""Caches between runs: decoded sets, and TFDS's facts about a data set that it prepared."""

import io
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from imgclf_jax.core import cache
from imgclf_jax.data import decoded, prepare, sources, stream


@dataclass
class Encoded:
    """Encoded noise; records the requested ids."""

    n: int = 12
    immutable: bool = True
    identity: str = "a"
    stamp: str = ""
    target_names: tuple = ()
    ids: list = field(default_factory=list)

    @property
    def class_names(self):
        return self.target_names or ("x", "y", "z")

    def __len__(self):
        return self.n

    def read(self, ids):
        self.ids += ids.tolist()
        files = []
        for i in ids:
            pixels = np.random.default_rng(int(i)).integers(0, 256, (6, 5), dtype=np.uint8)
            Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
            files.append(file.getvalue())
        y = {"target": np.sin(ids)[:, None]} if self.target_names else {"label": (ids % 3).astype(np.int32)}
        return {"image": files, **y}

    def fingerprint(self):
        return self.identity


OPS = "decode(1)|resize(7)"


def read_all(source, ops=OPS):
    everything = np.arange(len(source), dtype=np.int64)
    return stream.Images(source, ops).read(everything, everything)


@pytest.mark.parametrize("targets", [(), ("height",)])
def test_an_immutable_source_is_decoded_once(targets):
    """The second run decodes nothing and sees the same images and labels or targets, in training and in evaluation."""
    first = read_all(Encoded(target_names=targets))
    again = Encoded(target_names=targets)
    for name, values in read_all(again).items():
        np.testing.assert_array_equal(values, first[name])
    images = stream.Images(again, OPS)
    assert images.shape == (7, 7, 1)
    assert images.in_memory
    batches = list(stream.train_batches(images, 3, 4, 0, 9))
    fresh = list(stream.train_batches(stream.Images(Encoded(immutable=False, target_names=targets), OPS), 3, 4, 0, 9))
    for a, b in zip(batches, fresh, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert again.ids == []


@pytest.mark.parametrize(("source", "ops"), [
    (Encoded(immutable=False), OPS),  # it may have changed
    (Encoded(identity="b"), OPS),  # other examples
    (Encoded(stamp="b"), OPS),  # other files, of which TFDS says the same
    (Encoded(), "decode(1)|resize(8)"),  # other ops
    (Encoded(), f"decode(1)|{__name__}:own_op"),  # whose code may have changed
    (Encoded(), "decode(1)|random_resized_crop(4)"),  # no two reads alike
])  # fmt: skip
def test_what_is_decoded_anew(source, ops):
    read_all(Encoded())
    for _ in range(2 if not source.immutable or ":" in ops or "random" in ops else 1):
        source.ids.clear()
        read_all(source, ops)
        assert set(source.ids) == set(range(12))


def own_op(image):
    return image[:4, :4]


def test_a_part_of_a_set_is_not_kept():
    images = stream.Images(Encoded(), OPS)
    images.read(np.arange(11), np.arange(11))
    assert not cache.folder("decoded").exists()
    images.read(np.arange(11, 12), np.arange(11, 12))
    assert len(list(cache.folder("decoded").iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut short", "empty", "other bytes"])
def test_a_damaged_file_is_made_again(damage):
    first = read_all(Encoded())
    (file,) = cache.folder("decoded").iterdir()
    data = file.read_bytes()
    file.write_bytes(
        {"cut short": data[:300], "empty": b"", "other bytes": data[:200] + bytes(20) + data[220:]}[damage]
    )
    source = Encoded()
    np.testing.assert_array_equal(read_all(source)["image"], first["image"])
    assert set(source.ids) == set(range(12))
    assert decoded.load(source, OPS) is not None


def test_the_sets_used_longest_ago_make_room(monkeypatch):
    size = 12 * 49
    monkeypatch.setattr(decoded, "_KEEP_BYTES", 2 * (size + 1000))
    for name in "abc":
        read_all(Encoded(identity=name))
        if name == "b":
            read_all(Encoded(identity="a"))  # used again
    assert [decoded.load(Encoded(identity=name), OPS) is not None for name in "abc"] == [True, False, True]


def test_a_cache_folder_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read_all(Encoded())["image"].shape == (12, 7, 7, 1)


def test_a_split_is_immutable_if_all_its_parts_are():
    base = {"a": Encoded(), "b": Encoded(immutable=False)}
    assert sources.take_split(base, "a[:5]+a[7:]").immutable
    assert not sources.take_split(base, "a[:5]+b").immutable
    assert sources.take_split({"a": Encoded(stamp="x")}, "a[:5]").stamp == "x"


@pytest.fixture
def tfds(monkeypatch, tmp_path):
    """A stand-in for TFDS that counts calls: a builder whose data are prepared in a directory."""
    directory = tmp_path / "prepared"
    directory.mkdir()
    (directory / "dataset_info.json").write_text('{"version": "1.0.0"}')
    (directory / "train.array_record").write_bytes(b"12345")
    splits = {"train": SimpleNamespace(num_examples=20, num_bytes=5)}
    label = SimpleNamespace(names=["cat", "dog"])
    info = SimpleNamespace(full_name="pictures/1.0.0", splits=splits, features={"label": label})
    calls = []

    def prepare_tfds(*args):
        calls.append(args)
        return SimpleNamespace(info=info, data_path=directory), {"train": ["an example"]}

    monkeypatch.setattr(prepare, "prepare_tfds", prepare_tfds)
    return directory, calls


def test_what_tfds_said_is_remembered(tfds):
    """The second run takes names and sizes from the cache without TFDS, and opens the examples at the first read."""
    _, calls = tfds
    first = sources.open_splits("tfds('pictures')", "here")["train"]
    assert len(calls) == 1
    again = sources.open_splits("tfds('pictures')", "here")["train"]
    assert (len(again), again.class_names, again.fingerprint()) == (20, ("cat", "dog"), first.fingerprint())
    assert len(calls) == 1
    assert again.data_source == ["an example"]
    assert again.data_source == ["an example"]
    assert len(calls) == 2
    sources.open_splits("tfds('pictures')", "elsewhere")
    assert len(calls) == 3


@pytest.mark.parametrize("change", ["info", "size", "contents", "gone", "record"])
def test_tfds_is_asked_again_where_something_changed(tfds, change):
    directory, calls = tfds
    sources.open_splits("tfds('pictures')")
    (record,) = cache.folder("tfds").iterdir()
    if change == "info":
        (directory / "dataset_info.json").write_text('{"version": "1.0.1"}')
    elif change == "size":
        (directory / "train.array_record").write_bytes(b"123")
    elif change == "contents":
        (directory / "train.array_record").write_bytes(b"54321")
    elif change == "gone":
        (directory / "train.array_record").unlink()
    else:
        record.write_text(json.dumps([1]))
    sources.open_splits("tfds('pictures')")
    assert len(calls) == 2
