"""Images listed in a CSV table: what is read, and what is refused in one sentence."""

import csv
import logging
import os

import numpy as np
import pytest
from PIL import Image

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources, stream
from imgclf_jax.data.table import table

ROWS = [
    {"file": f"{'ab'[i % 2]}/{i}.png", "label": ("cat", "dog", "emu")[i % 3], "age": str(i / 4), "tall": str(i % 2),
     "split": "train" if i < 9 else "test", "weight": str(1 + i)}
    for i in range(12)
]  # fmt: skip


def write_csv(file, rows=ROWS, delimiter=","):
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def without(*columns, rows=ROWS):
    return [{k: v for k, v in row.items() if k not in columns} for row in rows]


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


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_table_of_labels_and_splits(images, kind):
    file = images / f"labels.{kind}"
    write_csv(file, delimiter="\t" if kind == "tsv" else ",")
    base = sources.open_splits(f"table({str(file)!r})")
    assert list(base) == ["train", "test"]
    assert base["train"].class_names == base["test"].class_names == ("cat", "dog", "emu")
    assert seen(base["train"]) == {i: i % 3 for i in range(9)}
    assert seen(base["test"]) == {i: i % 3 for i in range(9, 12)}


def test_targets_are_columns_of_numbers(images):
    base = table(write_csv(images / "t.csv"), targets=("age", "tall"))
    assert base["train"].target_names == base["train"].class_names == ("age", "tall")
    assert seen(base["train"], "target") == {i: [i / 4, i % 2] for i in range(9)}
    assert table(write_csv(images / "t.csv"), targets="age")["test"].target_names == ("age",)
    rows = [row | {"tall": i % 2 == 1} for i, row in enumerate(ROWS)]  # as pandas writes booleans
    assert seen(table(write_csv(images / "t.csv", rows), targets="tall")["train"], "target") == {
        i: [i % 2] for i in range(9)
    }


def test_columns_by_other_names(images, tmp_path_factory):
    """Explicit columns, root and class order take precedence, also without splits."""
    rows = [{"file": "none", "image": row["file"], "label": "x", "kind": row["label"], "split": "x"} for row in ROWS]
    file = write_csv(tmp_path_factory.mktemp("elsewhere") / "t.csv", rows)
    order = ("emu", "fox", "dog", "cat")
    base = table(file, "kind", split="", file="image", root=str(images), classes=order)
    assert seen(base["train"]) == {i: order.index(ROWS[i]["label"]) for i in range(12)}
    assert base["train"].class_names == order


def test_spaces_a_byte_order_mark_and_quotes(images):
    text = "\ufefffile , label\r\n" + "".join(f'"{r["file"]}" ,"{r["label"]}"\r\n\r\n' for r in ROWS[:3])
    (images / "t.csv").write_text(text.replace('" ,', '",'), encoding="utf-8")
    assert seen(table(str(images / "t.csv"))["train"]) == {0: 0, 1: 1, 2: 2}


def test_an_absolute_path_is_read_where_it_was_written(images, tmp_path_factory):
    rows = [row | {"file": str(images / row["file"])} for row in ROWS]
    assert table(write_csv(tmp_path_factory.mktemp("elsewhere") / "t.csv", rows))["train"].size == 9


def test_the_order_is_that_of_a_folder(images):
    """By a hash of the names, so that a slice of a table sorted by class has all classes."""
    rows = sorted(without("split"), key=lambda row: row["label"])
    a, b = (table(write_csv(images / "t.csv", some))["train"] for some in (rows, rows[::-1]))
    names = [a.example_name(i) for i in range(12)]
    assert names == [b.example_name(i) for i in range(12)]
    assert names != [str(images / row["file"]) for row in rows]


def prints(images, rows=ROWS, **options):
    return {name: source.fingerprint for name, source in table(write_csv(images / "t.csv", rows), **options).items()}


def test_the_fingerprint_covers_files_and_labels(images):
    first = prints(images)
    assert prints(images) == first
    assert prints(images, classes=("dog", "cat", "emu")) != first
    assert prints(images, targets=("age",))["train"] != prints(images, targets=("tall",))["train"]
    assert prints(images, [*ROWS[:-1], ROWS[-1] | {"weight": "7"}]) == first  # the record has the weights it samples by
    assert prints(images, [ROWS[0] | {"label": "dog"}, *ROWS[1:]])["train"] != first["train"]
    file, before = images / ROWS[0]["file"], (images / ROWS[0]["file"]).stat()
    other = images / "other.png"
    Image.fromarray(np.full((4, 5, 3), 9, np.uint8)).save(other, "BMP")
    assert other.stat().st_size == before.st_size
    other.replace(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = prints(images)
    assert changed["train"] != first["train"]
    assert changed["test"] == first["test"]


@pytest.mark.parametrize(("rows", "options", "message"), [
    (without("file"), {}, "unknown column 'file'"),
    (without("label"), {}, "tall, weight; name the one to use by label='…'"),
    (without("split"), {"split": "part"}, "unknown column 'part'"),
    (ROWS, {"label": "lable"}, "unknown column 'lable': did you mean 'label'"),
    (ROWS, {"targets": ("agee",)}, "unknown column 'agee': did you mean 'age'"),
    (ROWS, {"targets": ("age", "age")}, "names a column twice"),
    (ROWS, {"targets": ("label",)}, "line 2: the column 'label' holds 'cat', not a number"),
    ([ROWS[0], ROWS[1] | {"tall": "True"}], {"targets": ("tall",)}, "line 3: the column 'tall' holds 'True', not a"),
    ([ROWS[0], ROWS[1] | {"age": ""}], {"targets": ("age",)}, "line 3: the column 'age' is empty; it must hold the t"),
    ([ROWS[0], ROWS[1] | {"age": "nan"}], {"targets": ("tall", "age")}, "line 3: target 1 is nan; targets must"),
    ([ROWS[0], ROWS[1] | {"age": "1e39"}], {"targets": ("age",)}, "line 3: target 0 is inf; targets must"),
    ([ROWS[0], ROWS[1] | {"label": " "}], {}, "line 3: the column 'label' is empty; it must hold the label"),
    ([ROWS[0], ROWS[1] | {"split": ""}], {}, "line 3: the column 'split' is empty; it must hold the split"),
    ([ROWS[0], ROWS[1] | {"split": "a/b"}], {}, "line 3: the split 'a/b': allowed are letters"),
    ([ROWS[0], ROWS[1] | {"file": ""}], {}, "line 3: the column 'file' is empty; it must hold the file"),
    ([ROWS[0], ROWS[1] | {"file": "../b/1.png"}], {}, "line 3: '../b/1.png' leaves the root"),
    ([ROWS[0], ROWS[1] | {"file": "b/../../x"}], {}, "line 3: '../x' leaves the root"),
    (ROWS[:1], {}, "has 1 classes"),
    (ROWS, {"classes": ("cat", "dog")}, "line 4: the label 'emu' is not among classes=('cat', 'dog')"),
    (ROWS, {"classes": ("cat", "dog", "emu", "cat")}, "has 3 classes, 4 with repetitions"),
    (ROWS, {"root": "nowhere"}, "table: root: there is no directory 'nowhere'"),
    (ROWS, {"root": "/"}, "unreadable image: /a/0.png (No such file or directory)"),
    ([ROWS[0] | {"file": "a\0b"}, ROWS[1]], {}, "embedded null"),
])  # fmt: skip
def test_what_a_table_lacks_is_said_in_one_sentence(images, rows, options, message):
    with pytest.raises(UserError) as e:
        table(write_csv(images / "t.csv", rows), **options)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("t.csv", b"", "has no rows"),
    ("t.csv", b"file,label\n", "has no rows"),
    ("t.csv", b"file,label\na/0.png,cat,1\n", r"line 2 has 3 fields, but the header has 2; separate them by ','"),
    ("t.csv", b"file;label\na/0.png;cat\n", r"unknown column 'file': did you mean 'file;label'"),
    ("t.csv", b"file,file,label\na,b,c\n", r"has two columns with the same name"),
    ("t.csv", b"file,label\n\xff,cat\n", r"cannot read .* as UTF-8 text"),
    ("t.csv", b'file,label\n"a,cat\n', r"cannot read .* as UTF-8 text"),
    ("t.csv", b"file,label\n" + b"a" * 200_000 + b",cat\n", r"cannot read .* field larger than"),
    ("t.xlsx", b"", r"must be a \.csv or \.tsv file"),
])  # fmt: skip
def test_what_is_no_table_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        table(str(tmp_path / name))
    assert len(str(e.value)) < 600
    assert "\n" not in str(e.value)


def test_no_file_and_a_bucket(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        table(str(tmp_path / "t.csv"))
    with pytest.raises(UserError, match="is in a bucket"):
        table("s3://bucket/t.csv")


def test_broken_and_missing_files_are_listed_at_the_start(images):
    broken = [images / row["file"] for row in ROWS[:4]]
    broken[0].write_bytes(b"text")
    broken[1].unlink()
    broken[2].write_bytes(broken[2].read_bytes()[:50])
    broken[3].unlink()
    broken[3].mkdir()
    file = write_csv(images / "t.csv")
    with pytest.raises(UserError, match=r"table: unreadable image: .*No such file or directory.* and 1 more; rep") as e:
        table(file)
    assert all(str(name) in str(e.value) for name in sorted(broken)[:3])
    kept = table(file, unreadable="skip")
    assert seen(kept["train"]) == {i: i % 3 for i in range(4, 9)}
    assert list(kept["train"].skipped_files) == sorted(map(str, broken))


def test_skipping_leaves_no_split_without_images(images):
    for row in ROWS[9:]:
        (images / row["file"]).unlink()
    with pytest.raises(UserError, match="the split 'test' has no readable image"):
        table(write_csv(images / "t.csv"), unreadable="skip", targets="age")


def test_a_file_of_two_splits_is_warned_of(images, caplog):
    rows = [*ROWS, ROWS[0] | {"split": "test"}, ROWS[1] | {"file": str(images / "b/../b/1.png"), "split": "val"}]
    with caplog.at_level(logging.WARNING):
        base = table(write_csv(images / "t.csv", [*rows, rows[0]]))
    assert {name: source.size for name, source in base.items()} == {"train": 10, "val": 1, "test": 4}
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "splits train and val share 1 of their files" in warnings[0]
    assert "splits train and test share 1 of their files" in warnings[1]
