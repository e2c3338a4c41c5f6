"""The user's own images: layouts, order, and broken files named at the start instead of at step 40,000."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import image_files
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


# --- layouts ---


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
    splits = folder(str(flat), train_per_class=1)
    assert sorted(splits["train"].labels) == [0, 1, 2]
    assert sorted(splits["test"].labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    both = [file for source in splits.values() for file in files(source, flat)]
    assert sorted(both) == sorted(files(folder(str(flat))["train"], flat))
    for source in splits.values():
        names = files(source, flat)
        assert [source.class_names.index(f.split("/")[0]) for f in names] == source.labels.tolist()
        assert names == [file for file in files(folder(str(flat))["train"], flat) if file in names]  # in the same order
    again = folder(str(flat), train_per_class=1)
    assert again["train"].fingerprint == splits["train"].fingerprint
    draws = {tuple(files(folder(str(flat), 1, draw)["train"], flat)) for draw in range(8)}
    assert len(draws) > 3


@pytest.mark.parametrize(("count", "words"), [(4, "has 4 images"), (9, "has 4 images"), (-1, "above zero")])
def test_too_many_to_train_on(flat, count, words):
    with pytest.raises(UserError, match=words):
        folder(str(flat), train_per_class=count)


def test_classes_that_are_called_like_splits_are_classes(tmp_path):
    write(tmp_path / "train" / "1.png")
    write(tmp_path / "plane" / "1.png")
    assert folder(str(tmp_path))["train"].class_names == ("plane", "train")


def test_hidden_files_and_folders_are_passed_over(flat):
    for hidden in (".DS_Store", "cat/.DS_Store", "cat/._1.png", "cat/Thumbs.db", ".git/config", "dog/.cache/x.png"):
        (flat / hidden).parent.mkdir(exist_ok=True)
        (flat / hidden).write_bytes(b"not an image")
    source = folder(str(flat))["train"]
    assert (source.size, source.class_names) == (12, ("cat", "dog", "emu"))


def test_a_relative_path_and_the_home_directory(flat, monkeypatch):
    monkeypatch.chdir(flat.parent)
    monkeypatch.setenv("HOME", str(flat.parent))
    whole = folder(str(flat))["train"].fingerprint
    assert folder("animals")["train"].fingerprint == folder("~/animals")["train"].fingerprint == whole


@pytest.mark.parametrize("name", ["ä ö|('1').png", "\u2028.png", os.fsdecode(b"\xff\xfe.png")])
def test_any_file_name_is_read(flat, name):
    write(flat / "cat" / "new.png")
    (flat / "cat" / "new.png").rename(flat / "cat" / name)
    source = folder(str(flat))["train"]
    i = files(source, flat).index(f"cat/{name}")
    assert source.read(np.array([i]))["image"] == [(flat / "cat" / name).read_bytes()]
    assert len(source.fingerprint) == 64


# --- order ---


def test_the_order_depends_on_the_names_alone_and_any_slice_holds_all_classes(tmp_path):
    one = Image.new("L", (1, 1))
    for i in range(300):
        path = tmp_path / "one" / "abc"[i // 100] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        one.save(path)
    order = files(folder(str(tmp_path / "one"))["train"], tmp_path / "one")
    copy = tmp_path / "elsewhere"
    for file in sorted(order):  # made in another order, in another place
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(copy / file)
    source = folder(str(copy))["train"]
    assert files(source, copy) == order
    # Of 30 examples drawn at random each class has 10 ± 2.4.
    for start in range(0, 300, 30):
        counts = Counter(source.labels[start : start + 30].tolist())
        assert all(2 <= counts[c] <= 20 for c in range(3))


def test_one_file_more_leaves_the_order_of_the_others(flat):
    before = files(folder(str(flat))["train"], flat)
    write(flat / "dog" / "new.png")
    after = files(folder(str(flat))["train"], flat)
    assert [f for f in after if f != "dog/new.png"] == before


def test_fingerprint_tells_names_sizes_and_classes(flat):
    prints = {folder(str(flat))["train"].fingerprint}
    assert {folder(str(flat))["train"].fingerprint} == prints
    (flat / "cat" / "0.png").rename(flat / "cat" / "00.png")
    prints.add(folder(str(flat))["train"].fingerprint)
    write(flat / "cat" / "00.png", 99, size=(9, 9))
    prints.add(folder(str(flat))["train"].fingerprint)
    (flat / "emu").rename(flat / "gnu")
    prints.add(folder(str(flat))["train"].fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize("set_back", [False, True])
def test_fingerprint_tells_contents(flat, set_back):
    """Images replaced by others with the same names and sizes, with the old or new times."""
    for file in flat.rglob("*.png"):
        file.with_suffix(".bmp").write_bytes(b"")
        Image.open(file).save(file.with_suffix(".bmp"))
    before = {split: source.fingerprint for split, source in folder(str(flat), 2).items()}
    assert {split: source.fingerprint for split, source in folder(str(flat), 2).items()} == before
    for name in ("cat", "dog"):
        file = flat / name / {"cat": "0.bmp", "dog": "1.bmp"}[name]
        stat, content = file.stat(), bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        if set_back:
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert file.stat().st_size == stat.st_size
    after = {split: source.fingerprint for split, source in folder(str(flat), 2).items()}
    holds = {
        split: {"cat/0.bmp", "dog/1.bmp"} & set(files(source, flat)) for split, source in folder(str(flat), 2).items()
    }
    assert {split: after[split] != before[split] for split in after} == {split: bool(f) for split, f in holds.items()}
    assert any(holds.values())


# --- mistakes ---


def test_a_missing_directory_is_named_with_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        folder("no/such")
    assert "no directory 'no/such'" in str(e.value)
    assert str(tmp_path) in str(e.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no directory"):
        folder("file")


def test_an_empty_class_folder_is_named(flat):
    (flat / "fox").mkdir()
    (flat / "fox" / ".keep").write_text("")
    with pytest.raises(UserError, match="fox has no images; add some or remove it"):
        folder(str(flat))


@pytest.mark.parametrize("path", ["/", "/../.", "link"])
def test_the_root_of_a_file_system_is_refused(tmp_path, monkeypatch, path):
    """The config of a bundle named it, and `reproduce` listed the whole disk."""
    (tmp_path / "link").symlink_to("/")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(image_files, "walk", lambda *_: pytest.fail("the disk is listed"))
    with pytest.raises(UserError, match="is the root of a file system"):
        folder(path)


def test_two_classes_at_least(tmp_path):
    with pytest.raises(UserError, match="has 0 class folders; make one per class"):
        folder(str(tmp_path))
    write(tmp_path / "cat" / "1.png")
    write(tmp_path / "loose.png")
    with pytest.raises(UserError, match="has 1 class folders; make one per class"):
        folder(str(tmp_path))


@pytest.mark.parametrize("kind", ["text", "empty", "truncated jpeg", "truncated png", "missing"])
def test_what_is_no_whole_image_is_named(flat, kind):
    bad = flat / "dog" / {"text": "notes.jpg", "truncated jpeg": "half.jpg"}.get(kind, "bad.png")
    if kind == "missing":
        bad.symlink_to(flat / "nowhere.png")
    elif "truncated" in kind:
        write(bad, 5, size=(40, 40))
        bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    else:
        bad.write_text("remember the milk" if kind == "text" else "")
    with pytest.raises(UserError) as e:
        folder(str(flat))
    assert str(bad) in str(e.value)
    assert "repair, move or remove it" in str(e.value)
