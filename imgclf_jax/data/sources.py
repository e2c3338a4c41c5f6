"""Sources by name. A source spec names a function that returns `{base split: Source}`."""

import functools
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import Examples, Function
from imgclf_jax.data import imagenet_classes, splits
from imgclf_jax.data.arrays import array_source, arrays
from imgclf_jax.data.folder import folder
from imgclf_jax.data.prepare import tfds
from imgclf_jax.data.source import MAX_CLASSES, Source, concatenate
from imgclf_jax.data.table import table


def digits() -> dict[str, Source]:
    """scikit-learn's 1,797 handwritten digits, uint8[8, 8, 1]; 360 of them, stratified by class, are `test`.

    They are the test set of Alpaydin and Kaynak 1998 (UCI, CC BY 4.0), with levels from 0 to 16. The copy in
    `digits.npz` saves each start importing scikit-learn, and is split by its `train_test_split` with `random_state=0`.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        return {
            split: array_source(
                np.round(file[f"{split}_images"] * (255 / 16)).astype(np.uint8)[..., None],  # [n, 8, 8, 1]
                file[f"{split}_labels"].astype(np.int32),
                tuple("0123456789"),
            )
            for split in ("train", "test")
        }


def fake(n: int = 1024, shape: tuple[int, int, int] = (28, 28, 1), classes: int | str = 10) -> dict[str, Source]:
    """Synthetic examples for tests and timings: n each in `train` and `test`.

    `classes` is their number, or "imagenet" for ImageNet's. An image is noise hashed from example and pixel, with a
    bright band at a height given by the class. Raises UserError for impossible numbers, and images of over 16 MiB.
    """
    named = imagenet_classes.names() if classes == "imagenet" else ()
    count: Any = len(named) or classes
    numbers = (n, count, *shape) if isinstance(shape, (tuple, list)) and len(shape) == 3 else (0,)
    whole = all(type(number) is int and number > 0 for number in numbers)
    if not whole or n > 2**48 or count > MAX_CLASSES or shape[2] > 4 or math.prod(shape) > 2**24:
        raise UserError(f"fake({n!r}, {shape!r}, {classes!r}): expected at most 2**48 examples, a shape (height, "
                        "width, channels) of at most 4 channels and 2**24 values, and a million classes")  # fmt: skip
    names, size = named or tuple(str(c) for c in range(count)), math.prod(shape)

    def read(ids: np.ndarray, offset: int) -> Examples:
        labels = (ids % count).astype(np.int32)  # [n]
        first = (ids.astype(np.uint64)[:, None] + np.uint64(offset)) * np.uint64(size)
        x: np.ndarray = (first + np.arange(size, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)  # wraps modulo 2**64
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        noise = (x >> np.uint64(57)).astype(np.uint8)  # [n, h * w * c], 0 to 127
        band = np.arange(size) * count // size == labels[:, None]
        return {"image": (noise + np.uint8(128) * band).reshape(-1, *shape), "label": labels}

    def source(offset: int) -> Source:
        fingerprint = hashlib.sha256(f"fake {n} {tuple(shape)} {classes} {offset}".encode()).hexdigest()
        return Source(n, functools.partial(read, offset=offset), names, fingerprint)

    return {"train": source(0), "test": source(n)}


SOURCES: dict[str, Function] = {"digits": digits, "tfds": tfds, "folder": folder, "table": table, "arrays": arrays,
                                "fake": fake}  # fmt: skip


def open_splits(text: str, data_dir: str = "", manual_dir: str = "", unreadable: str = "error") -> dict[str, Source]:
    """Opens the base splits of the source that a spec names. Raises UserError if the data are missing."""
    try:
        make = spec.bind(spec.parse_one(text), SOURCES, "source")
    except UserError as e:
        if text in SOURCES or not re.fullmatch(r"[\w./~-]+", text):
            raise
        raise UserError(f"data.source={text!r}: {e}; for a folder of images write folder({text!r}), for a data set of "
                        f"TensorFlow Datasets tfds({text!r})") from e  # fmt: skip
    if make.func is tfds:
        make = functools.partial(make, **{"data_dir": data_dir, "manual_dir": manual_dir} | make.keywords)
    elif make.func in (folder, table):
        make = functools.partial(make, **{"unreadable": unreadable} | make.keywords)
    try:
        opened: dict[str, Source] = make()
    except (AttributeError, TypeError) as e:
        if spec.names_code(text):
            raise
        raise UserError(f"data.source={text!r} fails: {reason(e)}") from e
    if not isinstance(opened, Mapping) or not opened or not all(isinstance(one, Source) for one in opened.values()):
        raise UserError(f"data.source={text!r} returns {opened!r:.80}; return a dict {{'train': source}} of "
                        "imgclf_jax.data.source.Source")  # fmt: skip
    return opened


def take_split(base: Mapping[str, Source], text: str) -> Source:
    """The source of a split such as `train[:90%]+extra`."""
    parts = splits.resolve(text, {name: source.size for name, source in base.items()})
    if len(parts) == 1 and (parts[0].start, parts[0].stop) == (0, base[parts[0].name].size):
        return base[parts[0].name]
    try:
        return concatenate([(base[part.name], part.start, part.stop) for part in parts])
    except UserError as e:
        raise UserError(f"split {text!r}: {e}") from e
