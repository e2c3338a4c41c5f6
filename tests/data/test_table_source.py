"""Images listed in a CSV table: what is read, and what is refused in one sentence."""

import csv
import logging

import numpy as np
import pytest
from PIL import Image

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sampling, sources, stream
from imgclf_jax.data.table import table

ROWS = [
    {"file": f"{'ab'[i % 2]}/{i}.png", "label": ("cat", "dog", "emu")[i % 3], "age": str(i / 4), "tall": str(i % 2),
     "split": "train" if i < 9 else "test", "weight": str(1 + i)}
    for i in range(12)
]  # fmt: skip


def write_csv(file, rows=ROWS):
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


@pytest.fixture
def images(tmp_path):
    for i, row in enumerate(ROWS):
        file = tmp_path / row["file"]
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 5, 3), i, np.uint8)).save(file, "BMP")  # of one size, whatever the pixels
    return tmp_path


def seen(source, name="label"):
    """Maps the number of each image to what the source says about it."""
    got = stream.Images(source, "decode(3)").read(np.arange(source.size), np.arange(source.size))
    return {int(image[0, 0, 0]): y.tolist() for image, y in zip(got["image"], got[name], strict=True)}


def test_labels_and_splits_of_a_tsv_table(images):
    """With spaces, a byte-order mark, empty lines and absolute paths."""
    lines = [f" {images / row['file']}\t{row['split']}\t {row['label']}" for row in ROWS]
    text = "\r\n\r\n".join(["\ufeff file\tsplit \tlabel", *lines])
    (images / "labels.tsv").write_text(text, encoding="utf-8")
    base = sources.open_splits(f"table({str(images / 'labels.tsv')!r})")
    assert list(base) == ["train", "test"]
    assert base["train"].class_names == base["test"].class_names == ("cat", "dog", "emu")
    assert seen(base["train"]) == {i: i % 3 for i in range(9)}
    assert seen(base["test"]) == {i: i % 3 for i in range(9, 12)}


def test_targets_and_weights_are_columns_of_numbers(images):
    rows = [row | {"wet": i % 2 == 1} for i, row in enumerate(ROWS)]  # as pandas writes booleans
    base = table(write_csv(images / "t.csv", rows), targets=("age", "wet"))
    assert base["train"].target_names == base["train"].class_names == ("age", "wet")
    assert seen(base["train"], "target") == {i: [i / 4, i % 2] for i in range(9)}
    assert table(write_csv(images / "t.csv"), targets="age")["test"].target_names == ("age",)
    part = sources.take_split(base, "train[2:]")
    numbers = [ROWS.index(next(r for r in ROWS if str(images / r["file"]) == part.example_name(i))) for i in range(7)]
    assert [int(value) for value in part.columns["weight"]] == [1 + i for i in numbers]
    drawn = sampling.build("weighted('tall')", part).ids(0, np.arange(1000))
    assert {numbers[i] % 2 for i in drawn} == {1}


def test_columns_by_other_names(images, tmp_path_factory):
    """Explicit columns, root and class order take precedence, also without splits. The order is that of a folder."""
    rows = [{"file": "none", "image": row["file"], "label": "x", "kind": row["label"], "split": "x"} for row in ROWS]
    order, path = ("emu", "fox", "dog", "cat"), tmp_path_factory.mktemp("elsewhere") / "t.csv"
    a, b = (table(write_csv(path, some), "kind", split="", file="image", root=str(images), classes=order)["train"]
            for some in (rows, rows[::-1]))  # fmt: skip
    assert seen(a) == {i: order.index(ROWS[i]["label"]) for i in range(12)}
    assert a.class_names == order
    assert a.fingerprint == b.fingerprint
    assert [a.example_name(i) for i in range(12)] == [b.example_name(i) for i in range(12)]


def test_the_fingerprint_covers_files_and_labels(images):
    def prints(rows=ROWS, **options):
        base = table(write_csv(images / "t.csv", rows), **options)
        return {name: source.fingerprint for name, source in base.items()}

    first = prints()
    assert prints() == first
    assert prints(classes=("dog", "cat", "emu")) != first
    assert prints(targets=("age",))["train"] != prints(targets=("tall",))["train"]
    assert prints([*ROWS[:-1], ROWS[-1] | {"weight": "7"}]) == first  # the record has the weights it samples by
    assert prints([ROWS[0] | {"label": "dog"}, *ROWS[1:]])["train"] != first["train"]
    Image.fromarray(np.full((4, 5, 3), 99, np.uint8)).save(images / ROWS[0]["file"], "BMP")
    changed = prints()
    assert changed["train"] != first["train"]
    assert changed["test"] == first["test"]


@pytest.mark.parametrize(("change", "options", "message"), [
    ({}, {"label": "lable"}, "unknown column 'lable': did you mean 'label'"),
    ({}, {"targets": ("label",)}, "the column 'label' does not hold numbers: could not convert string to"),
    ({"age": ""}, {"targets": ("age",)}, "t.csv: the column 'age' is empty in row 2; it must hold the targets"),
    ({"age": "nan"}, {"targets": ("tall", "age")}, "b/1.png: target 1 is nan; targets must"),
    ({"label": " "}, {}, "the column 'label' is empty in row 2; it must hold the label"),
    ({"file": "a\0b"}, {}, "embedded null"),
    ({}, {"classes": ("cat", "dog")}, "t.csv: the label 'emu' is not among classes=('cat', 'dog')"),
    ({}, {"label": "one"}, "it has 1 classes"),
    ({}, {"root": "s3://bucket"}, "is in a bucket"),
    ({}, {"root": "/"}, "unreadable image: /a/0.png (No such file or directory)"),
    ({"file": "gone", "split": "val"}, {"unreadable": "skip"}, "the split 'val' has no readable image"),
    ({"file": "a/../a/0.png"}, {}, "a/0.png' differently; keep one of them"),
    ({"file": "a/4.png"}, {"targets": ("age",)}, "t.csv: rows 2 and 5 label '"),
])  # fmt: skip
def test_what_a_table_lacks(images, change, options, message):
    rows = [row | {"one": "x"} | (change if i == 1 else {}) for i, row in enumerate(ROWS)]
    with pytest.raises(UserError) as e:
        table(write_csv(images / "t.csv", rows), **options)
    assert message in str(e.value)


@pytest.mark.parametrize(("content", "message"), [
    (None, "there is no file"),
    (b"file,label\n", "has no rows"),
    (b"file,label\na/0.png,cat,1\n", r"the row \['a/0.png', 'cat', '1'\] has 3 fields, but the header has 2; separate"),
    (b"file;label\na/0.png;cat\n", r"unknown column 'file': did you mean 'file;label'"),
    (b"file,file,label\na,b,c\n", r"has two columns with the same name"),
    (b"file,label\n\xff,cat\n", r"cannot read .* as UTF-8 text"),
])  # fmt: skip
def test_what_is_no_table(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        table(str(tmp_path / "t.csv"))


def test_spaces_below_a_header_without_any_are_a_part_of_a_file_name(images):
    (images / "a/0.png").rename(images / " 0.png")
    (images / "t.csv").write_text("label,file\ncat, 0.png\ndog,b/1.png")
    assert seen(table(str(images / "t.csv"))["train"]) == {0: 0, 1: 1}


def test_a_file_of_two_splits_is_warned_of(images, caplog):
    rows = [*ROWS, ROWS[0] | {"split": "test"}, ROWS[1] | {"file": str(images / "b/../b/1.png"), "split": "val"}]
    with caplog.at_level(logging.WARNING):
        base = table(write_csv(images / "t.csv", [*rows, rows[0]]))
    assert {name: source.size for name, source in base.items()} == {"train": 10, "val": 1, "test": 4}
    assert "splits train and val share 1 of their files" in caplog.messages[0]
    assert "splits train and test share 1 of their files" in caplog.messages[1]
