"""The user's own images: layouts, order, and broken files named at the start instead of at step 40,000."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode, image_check, image_files
from imgclf_jax.data.folder import folder
from imgclf_jax.data.source import read_examples


def write(path, value=0, size=(8, 6)):
    """Writes an image of noise, so that truncating the file loses pixels; `value` sets the first pixel."""
    pixels = np.random.default_rng(value).integers(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def flat(tmp_path):
    root = tmp_path / "animals"
    for i in range(12):
        write(root / ("cat", "dog", "emu")[i % 3] / f"{i}.png", i)
    return root


def files(source, root):
    """The files of a source in its order, relative to `root`."""
    return [str(Path(source.example_name(i)).relative_to(root)) for i in range(source.size)]


def test_one_folder_a_class_is_the_split_train(flat):
    splits = folder(str(flat))
    assert splits.keys() == {"train"}
    source = splits["train"]
    assert source.class_names == ("cat", "dog", "emu")
    names = files(source, flat)
    assert sorted(names) == sorted(f"{('cat', 'dog', 'emu')[i % 3]}/{i}.png" for i in range(12))
    ids = np.array([7, 0, 7, 11])
    examples = read_examples(source, ids)
    assert examples["image"] == [(flat / names[i]).read_bytes() for i in ids]
    assert [source.class_names[label] for label in examples["label"]] == [names[i].split("/")[0] for i in ids]


def test_split_folders_share_the_classes_of_them_all(tmp_path):
    for split, names in {"train": "ac", "test": "abc", "val": "b"}.items():
        for name in names:
            write(tmp_path / split / name / "deep" / "er" / "1.png")
    splits = folder(str(tmp_path))
    assert {name: source.size for name, source in splits.items()} == {"train": 2, "test": 3, "val": 1}
    for split, source in splits.items():
        assert source.class_names == ("a", "b", "c")
        for file, label in zip(files(source, tmp_path / split), source.labels, strict=True):
            assert source.class_names[label] == file.split("/")[0]


def test_a_few_of_each_class_to_train_on(flat):
    """This many per class, and all others for testing; the same ones every time, others for another draw."""
    whole, splits = files(folder(str(flat))["train"], flat), folder(str(flat), train_per_class=1)
    assert {name: sorted(source.labels) for name, source in splits.items()} == {
        "train": [0, 1, 2], "test": [0, 0, 0, 1, 1, 1, 2, 2, 2]}  # fmt: skip
    for source in splits.values():
        names = files(source, flat)
        assert [source.class_names.index(f.split("/")[0]) for f in names] == source.labels.tolist()
        assert names == [file for file in whole if file in names]  # in the same order
    assert not set(files(splits["train"], flat)) & set(files(splits["test"], flat))
    draws = {tuple(files(folder(str(flat), 1, draw)["train"], flat)) for draw in (0, 0, 1, 2, 3, 4, 5, 6, 7)}
    assert 3 < len(draws) <= 8


def test_the_order_depends_on_the_names_alone_and_any_slice_holds_all_classes(tmp_path):
    for i in range(300):
        write(tmp_path / "one" / "abc"[i // 100] / f"{i:03}.png", size=(1, 1))
    order = files(folder(str(tmp_path / "one"))["train"], tmp_path / "one")
    copy = tmp_path / "elsewhere"
    for file in sorted(order)[1:]:  # made in another order, in another place, and one image less
        write(copy / file, size=(2, 2))
    source = folder(str(copy))["train"]
    assert files(source, copy) == [file for file in order if file != min(order)]
    # Of 30 examples drawn at random each class has 10 ± 2.4.
    for start in range(0, 270, 30):
        counts = Counter(source.labels[start : start + 30].tolist())
        assert all(2 <= counts[c] <= 20 for c in range(3))


def test_the_fingerprint_covers_names_classes_and_contents(flat):
    def fingerprint():
        return folder(str(flat))["train"].fingerprint

    prints = [fingerprint()]
    (flat / "cat" / "0.png").rename(flat / "cat" / "00.png")
    prints.append(fingerprint())
    (flat / "emu").rename(flat / "gnu")
    prints.append(fingerprint())
    file = flat / "cat" / "bits.bmp"  # of one size, whatever the pixels
    write(file, 1)
    prints.append(fingerprint())
    stat = file.stat()
    write(file, 2)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    prints.append(fingerprint())
    assert len(set(prints)) == 5
    assert fingerprint() == prints[-1]


@pytest.mark.parametrize(("change", "arguments", "message"), [
    ("", {"path": "no/such"}, "there is no directory 'no/such' (working directory: "),
    ("fox/.keep", {}, "fox has no images; add some or remove it"),
    ("", {"path": "cat"}, "cat has 0 class folders; make one per class"),
    ("", {"train_per_class": 4}, "has 4 images, which leaves none for `test`"),
    ("", {"train_per_class": -1}, "must be above zero"),
    ("", {"unreadable": "ask"}, "unknown value of unreadable 'ask'"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(flat, monkeypatch, change, arguments, message):
    monkeypatch.chdir(flat)
    if change:
        (flat / change).parent.mkdir()
        (flat / change).write_text("")
    with pytest.raises(UserError) as e:
        folder(**{"path": "."} | arguments)
    assert message in str(e.value)


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


def test_a_link_that_leads_nowhere_is_an_unreadable_image(flat):
    """Gone, to itself, or to a name that is too long for the disk."""
    targets = {"gone.png": "no.png", "loop.png": "loop.png", "long.png": "x" * 300, "loop": "loop"}
    for name, target in targets.items():
        (flat / "cat" / name).symlink_to(target)
    unreadable = image_check.check(flat / "cat", list(image_files.walk(flat / "cat"))).unreadable
    assert list(unreadable) == ["gone.png", "long.png", "loop.png"]
