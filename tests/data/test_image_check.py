"""Image files are checked once; unreadable ones are all found at the start, and skipped on request."""

import os
from pathlib import Path

import numpy as np
import pytest
from test_folder import flat, write  # noqa: F401  a fixture

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import image_check, sources, stream
from imgclf_jax.data.folder import folder


@pytest.fixture
def broken(flat):
    """Adds broken images to those of `flat`: truncated, of other contents, and gone."""
    bad = [flat / "cat" / "a.jpg", flat / "cat" / "b.png", flat / "dog" / "c.jpg", flat / "dog" / "d.png"]
    for i, file in enumerate(bad):
        write(file, i, (40, 40))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (flat / "emu" / "empty.png").write_bytes(b"")
    (flat / "emu" / "gone.png").symlink_to(flat / "nowhere")
    (flat / "emu" / "text.jpg").write_text("remember the milk")
    return [*bad, *(flat / "emu" / name for name in ("empty.png", "gone.png", "text.jpg"))]


@pytest.fixture
def decoded(monkeypatch):
    """The lengths of the files that the check decoded since it was last cleared."""
    lengths, original = [], image_check.decode.decode
    monkeypatch.setattr(
        image_check.decode, "decode", lambda data, **how: lengths.append(len(data)) or original(data, **how)
    )
    return lengths


def test_the_error_names_three_and_counts_the_others(flat, broken):
    with pytest.raises(UserError, match=r"and 4 more; repair.*data\.unreadable=skip") as e:
        folder(str(flat))
    assert all(f"{file} (the image does not decode: " in str(e.value) for file in broken[:3])


def test_skipping_gives_the_source_of_the_files_that_are_left(flat, broken, caplog):
    source = folder(str(flat), unreadable="skip")["train"]
    assert caplog.messages == [f"{flat}: unreadable files left out: 7, such as {broken[0]}"]
    assert source.skipped_files == folder(str(flat), 1, unreadable="skip")["test"].skipped_files
    assert source.skipped_files == tuple(map(str, broken))
    for file in broken:
        file.unlink()
    without = folder(str(flat))["train"]
    assert [source.example_name(i) for i in range(source.size)] == [without.example_name(i) for i in range(12)]
    assert source.fingerprint == without.fingerprint
    np.testing.assert_array_equal(source.labels, without.labels)


def test_a_changed_or_new_file_alone_is_checked_again(flat, decoded, monkeypatch):
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
    decoded.clear()
    monkeypatch.setattr(image_check.PIL, "__version__", "0")  # which may refuse other files
    folder(str(flat))
    assert len(decoded) == 13


@pytest.mark.parametrize("ops", ["decode(3)", "decode(3)|random_resized_crop(4)"])
def test_a_file_that_breaks_in_mid_stream_is_named_after_the_batches_before_it(flat, ops):
    source = sources.take_split(folder(str(flat)), "train[:50%]+train[50%:]")
    file = Path(source.example_name(7))
    file.write_bytes(file.read_bytes()[:60])
    batches = stream.eval_batches(stream.Images(source, ops), 3)
    assert [next(batches)["mask"].tolist() for _ in range(2)] == [[True] * 3] * 2
    with pytest.raises(UserError) as e:
        next(batches)
    assert str(e.value).startswith(f"{file}: the image does not decode")
