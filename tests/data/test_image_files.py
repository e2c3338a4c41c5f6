"""Which files are images, and what else a folder may contain."""

import os
import socket
import tempfile
from pathlib import Path

import pytest
from test_folder import files, flat, write  # noqa: F401  a fixture

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import image_check, image_files
from imgclf_jax.data.folder import folder
from imgclf_jax.tools.pages import inputs

STRAYS = ("README", "README.md", "notes.txt", "Thumbs.db", "desktop.ini", ".DS_Store", "._1.png", "labels.csv",
          "clip.mp4")  # fmt: skip


def find_files(words: list[str]) -> list[Path]:
    """The images that `predict` finds for these words."""
    return [Path(image) for image in inputs.find(words)]


def found_in(directory):
    others = []
    return list(image_files.walk(directory, others)), others


def add_special_files(directory):
    """Adds a pipe, a socket and a link to a device, all named .png: reading them would block or never end."""
    os.mkfifo(directory / "pipe.png")
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{short}/s")  # the path of a socket has about 100 characters at most
        os.rename(f"{short}/s", directory / "socket.png")
    (directory / "device.png").symlink_to("/dev/zero")


def test_other_files_are_listed_and_no_image(flat):
    write(flat / "cat" / "real.png")
    for name in STRAYS:
        (flat / "cat" / name).write_bytes(b"no image")
    images, others = found_in(flat / "cat")
    assert sorted(images) == sorted([*(f"{i}.png" for i in range(0, 12, 3)), "real.png"])
    assert sorted(others) == sorted(name for name in STRAYS if not name.startswith("."))


def test_special_files_are_counted_and_not_opened(flat, caplog):
    add_special_files(flat / "cat")
    (flat / "cat" / "linked.png").symlink_to(flat / "dog" / "1.png")  # a link to a regular file is one
    caplog.set_level("INFO")
    source = folder(str(flat))["train"]
    assert source.size == 13
    assert "cat/linked.png" in files(source, flat)
    assert caplog.messages == [f"{flat}: not used: 3 other files, such as cat/device.png"]


def test_training_and_prediction_agree(flat, caplog):
    add_special_files(flat / "cat")
    for place in STRAYS:
        (flat / "dog" / place).write_bytes(b"no image")
    write(flat / "emu" / "deep" / "x.png")
    caplog.set_level("INFO")
    source = folder(str(flat))["train"]
    found = find_files([str(flat)])
    assert sorted(found) == sorted(flat / file for file in files(source, flat))
    first, second = caplog.messages
    assert first == second
    assert "10 other files" in first


def test_capitals_and_formats_that_are_not_read(flat):
    """A photograph in a format that Pillow does not know is named, not skipped."""
    write(flat / "cat" / "x.png")
    (flat / "cat" / "x.png").rename(flat / "cat" / "X.PNG")
    assert "cat/X.PNG" in files(folder(str(flat))["train"], flat)
    (flat / "cat" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    with pytest.raises(UserError, match=r"cat/IMG_1\.HEIC \(the image is in none of the formats JPEG, "):
        folder(str(flat))


def test_links_to_folders_are_followed_but_not_in_a_circle(flat, tmp_path):
    write(tmp_path / "other" / "a.png")
    (tmp_path / "other" / "back").symlink_to(flat / "cat")
    (flat / "cat" / "more").symlink_to(tmp_path / "other")
    (flat / "cat" / "self").symlink_to(flat / "cat")
    found, _ = found_in(flat / "cat")
    assert found == ["0.png", "3.png", "6.png", "9.png", "more/a.png"]


def test_a_link_that_leads_nowhere_is_one_unreadable_image(flat):
    """Gone, to itself, or to a name that is too long for the disk."""
    targets = {"gone.png": "no.png", "loop.png": "loop.png", "long.png": "x" * 300, "loop": "loop"}
    for name, target in targets.items():
        (flat / "cat" / name).symlink_to(target)
    found, others = found_in(flat / "cat")
    unreadable = image_check.check(flat / "cat", found).unreadable
    assert list(unreadable) == ["gone.png", "long.png", "loop.png"]
    assert "symbolic links" in unreadable["loop.png"]
    assert others == ["loop"]


def test_a_folder_that_cannot_be_read_is_named(flat, monkeypatch):
    scandir = os.scandir

    def refused(path):
        if str(path).rstrip("/").endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (flat / "cat" / "deep").mkdir()
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"cannot read the folder .*cat/deep/: Permission denied; make it readable"):
        folder(str(flat))


def test_what_predict_is_told_to_read(flat):
    add_special_files(flat)
    for name in ("pipe.png", "socket.png"):
        with pytest.raises(UserError, match=f"{name}' is a pipe, socket or device; name image files"):
            inputs.check([str(flat / name)])
    (flat / "notes.txt").write_text("named, so it is tried")
    assert find_files([str(flat / "notes.txt")]) == [flat / "notes.txt"]


def test_the_order_is_that_of_names_folder_by_folder(tmp_path):
    for name in ("b/1.png", "b.png", "b-/2.png", "a/z.png", "a.png"):
        write(tmp_path / name)
    found = find_files([str(tmp_path)])
    assert found == sorted(p for p in Path(tmp_path).rglob("*.png"))
