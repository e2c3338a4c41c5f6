"""A cache of decoded sets between runs."""

import io

import numpy as np
import pytest
from PIL import Image

from imgclf_jax.core import cache
from imgclf_jax.data import decoded, stream
from imgclf_jax.data.source import Source


def encoded(n=12, cache_key="k", identity="a", ids=None):
    """A source of encoded noise that notes the requested ids."""

    def read(wanted):
        if ids is not None:
            ids.extend(wanted.tolist())
        files = []
        for i in wanted:
            pixels = np.random.default_rng(int(i)).integers(0, 256, (6, 5), dtype=np.uint8)
            Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
            files.append(file.getvalue())
        return {"image": files, "label": (wanted % 3).astype(np.int32)}

    return Source(n, read, ("x", "y", "z"), identity, cache_key=cache_key)


OPS = "decode(1)|resize(7)"


def read_all(source, ops=OPS):
    everything = np.arange(source.size, dtype=np.int64)
    return stream.Images(source, ops).read(everything, everything)


def test_a_source_with_a_key_is_decoded_once():
    """The second run decodes nothing and sees the same images and labels, in training and in evaluation."""
    first, ids = read_all(encoded()), []
    again = encoded(ids=ids)
    for name, values in read_all(again).items():
        np.testing.assert_array_equal(values, first[name])
    images = stream.Images(again, OPS)
    assert images.shape == (7, 7, 1)
    assert images.in_memory
    batches = list(stream.train_batches(images, 3, 4, 0, 9))
    fresh = list(stream.train_batches(stream.Images(encoded(cache_key=""), OPS), 3, 4, 0, 9))
    for a, b in zip(batches, fresh, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert ids == []


@pytest.mark.parametrize(("change", "ops"), [
    ({"cache_key": ""}, OPS),  # it may have changed
    ({"identity": "b"}, OPS),  # other examples
    ({"cache_key": "b"}, OPS),  # other files, of which TFDS says the same
    ({}, "decode(1)|resize(8)"),  # other ops
    ({}, f"decode(1)|{__name__}:own_op"),  # whose code may have changed
    ({}, "decode(1)|random_resized_crop(4)"),  # no two reads alike
])  # fmt: skip
def test_what_is_decoded_anew(change, ops):
    read_all(encoded())
    for _ in range(2 if change == {"cache_key": ""} or ":" in ops or "random" in ops else 1):
        ids = []
        read_all(encoded(**change, ids=ids), ops)
        assert set(ids) == set(range(12))


def own_op(image):
    return image[:4, :4]


def test_a_part_of_a_set_is_not_kept():
    images = stream.Images(encoded(), OPS)
    images.read(np.arange(11), np.arange(11))
    assert not cache.folder("decoded").exists()
    images.read(np.arange(11, 12), np.arange(11, 12))
    assert len(list(cache.folder("decoded").iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut short", "empty", "other bytes"])
def test_a_damaged_file_is_made_again(damage):
    first = read_all(encoded())
    (file,) = cache.folder("decoded").iterdir()
    data = file.read_bytes()
    file.write_bytes(
        {"cut short": data[:300], "empty": b"", "other bytes": data[:200] + bytes(20) + data[220:]}[damage]
    )
    ids = []
    source = encoded(ids=ids)
    np.testing.assert_array_equal(read_all(source)["image"], first["image"])
    assert set(ids) == set(range(12))
    assert decoded.load(source, OPS) is not None


def test_the_sets_used_longest_ago_make_room(monkeypatch):
    monkeypatch.setattr(decoded, "_KEPT", 2)
    for name in "abc":
        read_all(encoded(identity=name))
        if name == "b":
            read_all(encoded(identity="a"))  # used again
    assert [decoded.load(encoded(identity=name), OPS) is not None for name in "abc"] == [True, False, True]


def test_a_cache_folder_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read_all(encoded())["image"].shape == (12, 7, 7, 1)
