"""Images are checked once; unreadable ones are all found at the start, listed in one file, and skipped on request."""

import os
from pathlib import Path

import numpy as np
import pytest
from test_folder import flat, write  # noqa: F401  a fixture

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import image_check, image_files, sources, stream
from imgclf_jax.data.folder import folder


def shorten(file, by=0.5):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * by)])


@pytest.fixture
def broken(flat):
    """The images of `flat` with seven broken ones, which are returned too."""
    bad = []
    for i in range(6):
        file = flat / ("cat", "dog")[i % 2] / f"bad{5 - i}.jpg"
        write(file, i, (40, 40))
        shorten(file)
        bad.append(file)
    (flat / "emu" / "gone.png").symlink_to(flat / "nowhere")
    return sorted([*bad, flat / "emu" / "gone.png"])


@pytest.fixture
def decoded(monkeypatch):
    """The lengths of the files that the check decoded since it was last cleared."""
    lengths, original = [], image_check.decode.decode
    monkeypatch.setattr(
        image_check.decode, "decode", lambda data, **how: lengths.append(len(data)) or original(data, **how)
    )
    return lengths


def unreadable(*arguments, **how):
    return image_check.check(*arguments, **how).unreadable


def test_the_error_names_three_and_counts_the_others(flat, broken):
    with pytest.raises(UserError, match=r"and 4 more; repair.*data\.unreadable=skip") as e:
        folder(str(flat))
    assert all(str(file) in str(e.value) for file in broken[:3])
    assert "(the image does not decode: " in str(e.value)


def test_skipping_gives_the_source_of_the_files_that_are_left(flat, broken, caplog):
    source = folder(str(flat), unreadable="skip")["train"]
    [message] = caplog.messages
    assert message == f"{flat}: unreadable files left out: 7, such as {broken[0]}"
    assert source.skipped_files == tuple(map(str, broken))
    few = folder(str(flat), 1, unreadable="skip")
    assert few["test"].skipped_files == source.skipped_files
    for file in broken:
        file.unlink()
    without = folder(str(flat))["train"]
    assert [source.example_name(i) for i in range(source.size)] == [without.example_name(i) for i in range(12)]
    assert source.fingerprint == without.fingerprint
    np.testing.assert_array_equal(source.labels, without.labels)


# --- the cache ---


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
    assert folder(str(flat))["train"].size == 12
    folder(str(flat))
    assert len(decoded) == 24


# --- big folders: headers, until pixels are wanted ---


@pytest.fixture
def big(monkeypatch, decoded):
    monkeypatch.setattr(image_check, "_MAX_DECODED", 0)
    return decoded


def test_of_a_big_folder_headers_are_read(tmp_path, big):
    for i in range(8):
        write(tmp_path / "cat" / f"{i}.png", i, (50, 60))
    names = list(image_files.walk(tmp_path, []))
    assert unreadable(tmp_path, names) == {}
    assert big == []
    shorten(tmp_path / "cat/3.png")
    (tmp_path / "cat/6.png").write_bytes(b"<html>")
    names = list(image_files.walk(tmp_path, []))
    for _ in range(2):  # the second time from memory
        assert list(unreadable(tmp_path, names)) == ["cat/6.png"]
    assert big == []
    assert list(unreadable(tmp_path, names, decode_all=True)) == ["cat/3.png", "cat/6.png"]
    assert len(big) == 7
    unreadable(tmp_path, names)
    assert len(big) == 7


def test_damage_in_the_middle_is_named_in_training_and_left_out_by_skip(flat, big):
    file = flat / "cat" / "0.png"
    write(file, 0, (8, 6))
    content = bytearray(file.read_bytes())
    content[60:70] = bytes(10)
    file.write_bytes(content)
    source = folder(str(flat))["train"]
    with pytest.raises(UserError) as e:
        list(stream.eval_batches(stream.Images(sources.take_split({"train": source}, "train[:]"), "decode(3)"), 4))
    assert str(e.value).startswith(f"{file}: the image does not decode")
    assert folder(str(flat), unreadable="skip")["train"].skipped_files == (str(file),)


def test_another_version_of_pillow_checks_again(flat, big, monkeypatch):
    names = list(image_files.walk(flat, []))
    unreadable(flat, names, decode_all=True)
    monkeypatch.setattr(image_check.PIL, "__version__", "0")
    unreadable(flat, names, decode_all=True)
    assert len(big) == 24


def test_a_file_that_may_not_be_read_is_tried_again(flat, monkeypatch):
    """Permissions change without changing the file's time."""
    names = list(image_files.walk(flat, []))
    read = paths.read

    def refused(file):
        if file.name == "3.png":
            raise PermissionError(13, "Permission denied", str(file))
        return read(file)

    with monkeypatch.context() as patch:
        patch.setattr(paths, "read", refused)
        assert unreadable(flat, names) == {"cat/3.png": "Permission denied"}
    assert unreadable(flat, names) == {}


# --- in the stream ---


@pytest.mark.parametrize("split", ["train", "train[:50%]+train[50%:]"])
@pytest.mark.parametrize("prefetch", [1, 8])
def test_a_file_that_breaks_in_mid_stream_is_named_after_the_batches_before_it(flat, split, prefetch):
    source = sources.take_split(folder(str(flat)), split)
    file = Path(folder(str(flat))["train"].example_name(7))
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
    write(Path(source.example_name(5)), size=(9, 6))
    with pytest.raises(UserError) as e:
        list(stream.train_batches(stream.Images(source, "decode(3)"), 0, 4, 0, 3))
    assert "different shapes, such as (8, 6, 3) and (9, 6, 3); add resize(height, width)" in str(e.value)
    mended = stream.Images(source, "decode(3)|resize(8, 6)")
    assert [b["image"].shape for b in stream.train_batches(mended, 0, 4, 0, 3)] == [(4, 8, 6, 3)] * 3
