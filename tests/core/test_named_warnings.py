"""Warnings of the decoder become log lines that name the image, in every thread; other warnings stay warnings."""

import concurrent.futures
import logging
import warnings

import pytest

from imgclf_jax.core import named_warnings


@pytest.fixture(autouse=True)
def _afresh(monkeypatch):
    monkeypatch.setattr(named_warnings, "_logged", set())
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        named_warnings.install()
        yield


def warn(text):
    """Warns like a Pillow plugin."""
    exec(compile(f"import warnings; warnings.warn({text!r})", "plugin", "exec"), {"__name__": "PIL.XImagePlugin"})


def test_each_image_is_named_once(caplog):
    def decode(i):
        with named_warnings.about(lambda: f"{i % 10}.jpg"):
            warn("Corrupt EXIF data")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(decode, range(40)))
    assert sorted(caplog.messages) == [f"{i}.jpg: Corrupt EXIF data" for i in range(10)]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_warning_of_no_image_is_printed_as_usual(caplog, monkeypatch):
    printed = []
    monkeypatch.setattr(named_warnings, "_default", lambda message, *_: printed.append(str(message)))
    with named_warnings.about(lambda: "a.jpg"):
        pass
    warnings.warn("something else", stacklevel=1)
    assert printed == ["something else"]
    assert not caplog.messages


def test_a_million_bad_images_do_not_fill_the_log(caplog):
    for i in range(200):
        with named_warnings.about(lambda i=i: f"{i}.jpg"):
            warn("Corrupt EXIF data")
    assert len(caplog.messages) == 101
    assert caplog.messages[-1] == "more than 100 image warnings; the rest are not logged"
