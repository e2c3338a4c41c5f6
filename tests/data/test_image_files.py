"""Which files are images, for training and prediction alike."""

import os

import pytest
from test_folder import files, flat, write  # noqa: F401  a fixture

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode, image_check, image_files
from imgclf_jax.data.folder import folder


def test_training_and_prediction_read_the_same_files(flat):
    """Regular files with the suffix of an image: no pipe or device, which would block, no text, no hidden file."""
    os.mkfifo(flat / "cat" / "pipe.png")
    (flat / "cat" / "device.png").symlink_to("/dev/zero")
    (flat / "cat" / "folder.png").mkdir()
    (flat / "cat" / "linked.png").symlink_to(flat / "dog" / "1.png")
    for name in ("README", "notes.txt", "Thumbs.db", ".DS_Store", "._1.png", "clip.mp4"):
        (flat / "dog" / name).write_bytes(b"no image")
    write(flat / "emu" / "deep" / "x.png")
    (flat / "emu" / "deep" / "x.png").rename(flat / "emu" / "deep" / "X.PNG")
    source = folder(str(flat))["train"]
    assert source.size == 14
    assert {"cat/linked.png", "emu/deep/X.PNG"} < set(files(source, flat))
    assert sorted(image_files.walk(flat)) == sorted(files(source, flat))  # what prediction reads


def test_an_image_in_a_format_that_is_not_read_is_named_and_not_skipped(flat, monkeypatch):
    monkeypatch.setattr(decode, "FORMATS", [form for form in decode.FORMATS if form != "HEIF"])
    (flat / "cat" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    message = r"cat/IMG_1\.HEIC \(the image is in none of the formats JPEG, .*install pillow-heif if it is HEIC\)"
    with pytest.raises(UserError, match=message):
        folder(str(flat))


def test_links_to_folders_are_followed_but_not_in_a_circle(flat, tmp_path):
    write(tmp_path / "other" / "a.png")
    (tmp_path / "other" / "back").symlink_to(flat / "cat")
    (flat / "cat" / "more").symlink_to(tmp_path / "other")
    (flat / "cat" / "self").symlink_to(flat / "cat")
    assert list(image_files.walk(flat / "cat")) == ["0.png", "3.png", "6.png", "9.png", "more/a.png"]


def test_a_link_that_leads_nowhere_is_an_unreadable_image(flat):
    """Gone, to itself, or to a name that is too long for the disk."""
    targets = {"gone.png": "no.png", "loop.png": "loop.png", "long.png": "x" * 300, "loop": "loop"}
    for name, target in targets.items():
        (flat / "cat" / name).symlink_to(target)
    unreadable = image_check.check(flat / "cat", list(image_files.walk(flat / "cat"))).unreadable
    assert list(unreadable) == ["gone.png", "long.png", "loop.png"]
