"""The location of the cache folder."""

import os
from pathlib import Path

import pytest

from imgclf_jax.core import cache


def test_an_absolute_place_of_one_s_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder("x") == tmp_path / "imgclf_jax" / "x"


@pytest.mark.parametrize("value", ["", "relative", "./here", "~/cache", None])
def test_an_empty_or_relative_place_does_not_count(monkeypatch, tmp_path, value):
    """By the XDG specification; otherwise the files would be wherever a command is run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache.folder("x") == tmp_path / ".cache" / "imgclf_jax" / "x"


def test_without_a_home_nothing_is_kept(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user that nobody knows
    with pytest.raises(OSError):
        cache.folder("x").mkdir(parents=True)
    assert cache.folder("x").is_relative_to(Path(os.devnull))
