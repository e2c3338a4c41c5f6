"""Files are written completely or not at all, and the error for a full disk names the file."""

import contextlib
import os
import resource
import sys
from pathlib import Path

import pytest

from imgclf_jax.core import paths


@contextlib.contextmanager
def full_disk(nbytes=4096):
    """Makes the system refuse to grow any file, including those that C++ libraries write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_full_disk_names_the_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    with full_disk(), pytest.raises(OSError, match=r"large|space") as e:
        paths.write_atomically(path, bytes(100_000))
    assert e.value.filename == str(path)
    assert e.value.strerror
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"
    paths.write_atomically(path, bytes(100_000))
    assert path.stat().st_size == 100_000
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """Else a power cut leaves an empty file in place of the old one."""
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("renamed") or replace(a, b))
    paths.write_atomically(tmp_path / "out", "new")
    assert done == [(tmp_path / "out").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / "out"
    with paths.replacing(path) as first:
        first.write(b"the fir")
        with paths.replacing(path) as second:
            second.write(b"the second")
        assert path.read_text() == "the second"
        first.write(b"st")
    assert path.read_text() == "the first"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert paths.as_path("~/photos") == Path("/home/ada/photos")
    assert paths.as_path("a/~x") == Path("a/~x")
