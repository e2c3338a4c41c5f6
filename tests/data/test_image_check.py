"""Image files are checked once; unreadable ones are all found at the start, and skipped on request."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_decode import png
from test_folder import flat, write  # noqa: F401  a fixture

from imgclf_jax.cli import arguments, openers
from imgclf_jax.config import default_config, to_json
from imgclf_jax.core import json_files
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import image_check, sources, stream
from imgclf_jax.data.folder import folder
from imgclf_jax.run.provenance import take_snapshot
from imgclf_jax.run.workdir import Workdir


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


@pytest.mark.parametrize(("form", "dtype", "top"), [("PNG", np.uint16, 4095), ("TIFF", np.int32, 16)])
def test_deep_images_with_small_values(tmp_path, caplog, form, dtype, top):
    """They are scaled by the bits of the whole set, which the run records; an image with more bits is an error."""
    for name, value in (("train/a", top), ("train/b", 3), ("test/a", 1), ("test/b", 0)):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(np.full((2, 2), value, dtype)).save(tmp_path / name / "x.png", form)
    bits, base = top.bit_length(), sources.open_splits(f"folder({str(tmp_path)!r})")
    assert f"hold values of up to {bits} bits, which are scaled to 8" in caplog.text
    images = stream.Images(sources.take_split(base, "test+train"), "decode(1)")
    read = images.read(np.arange(4), np.arange(4))["image"][:, 0, 0, 0]
    assert sorted(read.tolist()) == sorted(value * 256 >> bits for value in (top, 3, 1, 0))
    json_files.write(tmp_path / "provenance.json", take_snapshot({}, images.describe()))
    assert Workdir(tmp_path).load_data_info().bits == bits
    ops, _ = image_check.decode.build("decode(1)", bits)
    with pytest.raises(UserError, match=f"more than {bits} bits per channel: its values are from 40000 to 40000"):
        ops(Image.fromarray(np.full((2, 2), 40_000, np.uint16)), 0, 0)


def test_color_whose_low_bytes_are_lost_is_unreadable(flat):
    (flat / "cat" / "deep.png").write_bytes(png(np.full((2, 2, 3), 4095), 16, 2))
    with pytest.raises(UserError, match=r"deep\.png \(the image has 16 bits per channel and color, and no value above"):
        folder(str(flat))


def test_a_run_that_skips_goes_on_skipping(tmp_path):
    config = default_config()
    config.data.unreadable = "skip"
    text, explicit = to_json(config), ["--config.data.unreadable=error"]
    for recorded, flags, expected in ((text, [], "skip"), (text, explicit, "error"), ("damaged", [], "error")):
        (tmp_path / "config.json").write_text(recorded)
        line = arguments.parse(["train", f"--workdir={tmp_path}", *flags], "launch.py", ["launch.py"])
        assert openers.from_file(line)[0].data.unreadable == expected


@pytest.mark.parametrize("ops", ["decode(3)", "decode(3)|random_resized_crop(4)"])
def test_a_file_that_breaks_in_mid_stream_is_named_after_the_batches_before_it(flat, ops):
    source = sources.take_split(folder(str(flat)), "train[:50%]+train[50%:]")
    file = Path(source.example_name(7))
    images = stream.Images(source, ops)
    file.write_bytes(file.read_bytes()[:60])
    batches = stream.eval_batches(images, 3)
    assert [next(batches)["mask"].tolist() for _ in range(2)] == [[True] * 3] * 2
    with pytest.raises(UserError) as e:
        next(batches)
    assert str(e.value).startswith(f"{file}: the image does not decode")
