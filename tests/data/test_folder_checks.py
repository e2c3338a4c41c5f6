"""Each image of a folder is checked once, and broken ones are named."""

import os
from pathlib import Path

import pytest
from test_folder import flat, write  # noqa: F401  a fixture

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import image_check, sources, stream
from imgclf_jax.data.folder import folder


@pytest.fixture
def decoded(monkeypatch):
    """The number of files that the check decoded since it was last cleared."""
    calls = []

    def counting(data, **how):
        calls.append(len(data))
        return original(data, **how)

    original = image_check.decode
    monkeypatch.setattr(image_check, "decode", counting)
    return calls


def test_a_second_open_decodes_nothing(flat, decoded):
    folder(str(flat))
    assert len(decoded) == 12
    decoded.clear()
    folder(str(flat))
    assert decoded == []


def test_a_changed_or_new_file_alone_is_checked_again(flat, decoded):
    folder(str(flat))
    decoded.clear()
    before = (flat / "cat" / "0.png").stat()
    write(flat / "cat" / "0.png", 50, size=(30, 30))  # another size
    os.utime(flat / "cat" / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(flat / "dog" / "1.png", ns=(0, 12345))  # another time
    write(flat / "emu" / "new.png", 51)
    folder(str(flat))
    changed = ("cat/0.png", "dog/1.png", "emu/new.png")
    assert sorted(decoded) == sorted((flat / file).stat().st_size for file in changed)


def test_a_file_broken_after_the_check_is_found_at_the_next(flat):
    folder(str(flat))
    (flat / "cat" / "0.png").write_text("text")
    for _ in range(2):  # and found again until it is mended
        with pytest.raises(UserError, match=r"cat/0\.png"):
            folder(str(flat))
    write(flat / "cat" / "0.png")
    folder(str(flat))


@pytest.mark.parametrize("content", ["{", "", "[]", "3", '{"cat/0.png": 1}'])
def test_a_damaged_memory_means_checking_again(flat, decoded, content):
    folder(str(flat))
    (record,) = (p for p in Path(os.environ["XDG_CACHE_HOME"]).rglob("*") if p.is_file())
    record.write_text(content)
    decoded.clear()
    folder(str(flat))
    assert len(decoded) == 12


def test_a_cache_folder_that_cannot_be_written_costs_the_memory_alone(flat, decoded, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(folder(str(flat))["train"]) == 12
    folder(str(flat))
    assert len(decoded) == 24


@pytest.mark.parametrize("split", ["train", "train[:50%]+train[50%:]"])
@pytest.mark.parametrize("prefetch", [1, 8])
def test_a_file_that_breaks_in_mid_stream_is_named_after_the_batches_before_it(flat, split, prefetch):
    source = sources.take_split(folder(str(flat)), split)
    file = flat / folder(str(flat))["train"].files[7]
    file.write_bytes(file.read_bytes()[:60])
    for batches in (
        stream.eval_batches(stream.Images(source, "decode(3)"), 3, prefetch=prefetch),
        stream.train_batches(stream.Images(source, "decode(3)|random_resized_crop(4)"), 0, 3, 0, 4, prefetch=prefetch),
    ):
        with pytest.raises(UserError) as e:
            list(batches)
        assert str(e.value).startswith(f"{file}: the image does not decode")
    batches = stream.eval_batches(stream.Images(source, "decode(3)"), 3, prefetch=prefetch)
    assert [next(batches)["image"].shape for _ in range(2)] == [(3, 8, 6, 3)] * 2
    with pytest.raises(UserError):
        next(batches)


def test_images_of_different_shapes_are_refused_with_the_mend(flat):
    source = folder(str(flat))["train"]
    write(flat / source.files[5], size=(9, 6))
    with pytest.raises(UserError) as e:
        list(stream.train_batches(stream.Images(source, "decode(3)"), 0, 4, 0, 3))
    assert "different shapes, such as (8, 6, 3) and (9, 6, 3); add resize(height, width)" in str(e.value)
    mended = stream.Images(source, "decode(3)|resize(8, 6)")
    assert [b["image"].shape for b in stream.train_batches(mended, 0, 4, 0, 3)] == [(4, 8, 6, 3)] * 3
