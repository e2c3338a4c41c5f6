"""What training prints: lines that fit, with what a person wants to know of the run and of each record."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imgclf_jax.core import cpuinfo, sharding
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import display
from imgclf_jax.train.display import Rows

ROOT = Path(__file__).parents[2]
TRAINING = {"loss": 0.23017, "accuracy": 0.92733, "learning_rate": 1.9876e-3, "grad_norm": 1.0, "param_norm": 9.0,
            "images_per_second": 12345.6, "input_wait": 0.02}  # fmt: skip


def rows(**changes):
    given = {"total": 674, "steps_per_epoch": 22.45, "sets": ("test",), "metric": "accuracy",
             "marked": {"test/accuracy": 1.0}}  # fmt: skip
    return Rows(**given | changes)


def test_the_rows_of_a_run():
    """Columns of one width; the best is marked, and an equal value is not better."""
    log = rows()
    lines = [
        log.header(),
        log.training(113, TRAINING),
        log.evaluation(113, "test", {"examples": 360, "accuracy": 0.9694, "loss": 0.1154, "nll": 0.1154, "top5": 1.0}),
        log.evaluation(225, "test", {"examples": 360, "accuracy": 0.9694, "loss": 0.1, "nll": 0.2, "top5": 1.0}),
        log.training(674, TRAINING | {"input_wait": 0.25}),
    ]
    assert lines == [
        "step  epoch  set       loss  accuracy        lr  images/s",
        " 113    5.0  train   0.2302    0.9273   0.00199    12,346",
        " 113    5.0  test    0.1154    0.9694  best  top5 1.0000",
        " 225   10.0  test    0.1000    0.9694        nll 0.2000  top5 1.0000",
        " 674   30.0  train   0.2302    0.9273   0.00199    12,346  waited 25%",
    ]


@pytest.mark.parametrize("changes", [
    {"total": 2**31 - 1, "steps_per_epoch": 1e4}, {"sets": ("a_validation_set_of_a_long_name",)}, {"metric": ""},
    {"metric": "mean_average_precision"},
])  # fmt: skip
def test_a_row_fits_into_80_columns(changes):
    """Whatever the numbers and names; the time before it takes nine columns."""
    log = rows(**changes)
    large = {
        "loss": 1.2345e30,
        "accuracy": 1e-9,
        "mean_average_precision": 0.123456,
        **{f"own_{i}": 1.0 for i in range(9)},
    }
    for line in (log.header(), log.training(2**31 - 1, TRAINING | large | {"images_per_second": 1e6}),
                 log.evaluation(2**31 - 1, log.sets[0], large)):  # fmt: skip
        assert len(line) <= 71


def test_records_without_some_values():
    """Such as those of a method without a head, or of steps that were all left out."""
    assert rows(metric="").training(1, {"loss": 2.0, "learning_rate": 0.1}).split() == [
        "1",
        "0.0",
        "train",
        "2.0000",
        "0.1",
    ]
    assert rows().training(1, {}).split() == ["1", "0.0", "train"]


def test_a_set_on_which_nothing_is_measured_has_no_row():
    """As with a method without a head."""
    log = rows(metric="", marked={"test/loss": -1.0})
    assert log.evaluations(1, {"test": {"examples": 9}, "val": {"examples": 9, "spread": 0.5}}) == [
        log.evaluation(1, "val", {"spread": 0.5})
    ]


def test_the_best_so_far_is_that_of_the_whole_run():
    """Also of what was recorded before the run was resumed; what is not finite is never best."""
    log = rows(marked={"val/loss": -1.0}, sets=("val", "test"))
    for record in ({"step": 1, "val/loss": 2.0}, {"step": 2, "val/loss": None}, {"step": 3, "train/loss": 0.0}):
        log.note(record)
    marks = ["best" in log.evaluation(step, "val", {"loss": loss})
             for step, loss in enumerate((2.0, float("nan"), 1.5, 1.7, float("-inf"), 1.0))]  # fmt: skip
    assert marks == [False, False, True, False, False, True]
    assert "best" not in log.evaluation(9, "test", {"loss": 0.0, "accuracy": 1.0})


def test_the_best_so_far_is_none_that_a_kill_lost(tmp_path, fake_config):
    """A run that resumes at step 4 evaluates at step 8 again, and the mark was missing."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "test/accuracy": 0.5}\n{"step": 8, "test/accuracy": 0.7}\n')
    recipe = Recipe(fake_config, DataInfo(64, (12, 12, 1), tuple("abcd"), ""))
    log = display.make_rows(recipe, range(64), Workdir(tmp_path), start=4)
    marks = ["best" in log.evaluation(step, "test", {"accuracy": value}) for step, value in ((8, 0.7), (12, 0.6))]
    assert marks == [True, False]


@pytest.mark.parametrize(("names", "labels", "said"), [
    (["cat", "dog"], [0, 0, 1], "2 classes: cat 2, dog 1"),
    (["a\x1b", "b"], [0, 1], r"2 classes: a\x1b 1, b 1"),
    (list("abcde"), [0, 1, 2, 3, 4, 4], "5 classes of 1 to 2"),
    (list("abcde"), [0, 1, 2, 3, 4], "5 classes of 1"),
    (list("abcde"), None, "5 classes"),
])  # fmt: skip
def test_classes(names, labels, said):
    assert display.classes(names, None if labels is None else np.array(labels)) == said


def test_facts_in_two_columns():
    text = display.facts({"data": "one two three\n table  row that is not wrapped", "seed": "0"}, width=22)
    assert text.split("\n") == [
        "  data       one two",
        "             three",
        "              table  row that is not wrapped",
        "  seed       0",
    ]


@pytest.mark.parametrize(("flags", "lacking"), [
    ({"flags": "fpu sse2 avx avx2 fma"}, True),  # AMD Zen 3, Intel Core
    ({"flags": "fpu sse2 avx2 avx512f avx512_vnni"}, True),  # Intel Cascade Lake
    ({"flags": "fpu sse2 avx2 avx512f avx512_bf16"}, False),  # AMD Zen 4
    ({"Features": "fp asimd atomics asimddp"}, True),  # AWS Graviton 2
    ({"Features": "fp asimd asimddp sve i8mm bf16"}, False),  # AWS Graviton 3
    ({}, False),  # unknown
])  # fmt: skip
def test_the_head_says_where_bfloat16_is_slow(monkeypatch, flags, lacking):
    monkeypatch.setattr(cpuinfo, "facts", lambda: flags)
    mesh = sharding.make_mesh()
    assert ("precision=float32 may be faster" in display.devices(mesh, "bfloat16")) is lacking
    assert display.devices(mesh, "float32").endswith("), float32")


def test_what_to_run_next(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/launch.py", "train"])
    assert display.next_commands("runs/a b", predicts=True) == [
        "  uv run launch.py report --workdir 'runs/a b'        curves, scores, mistakes",
        "  uv run launch.py predict FILE --workdir 'runs/a b'  new images",
        "  uv run launch.py serve --workdir 'runs/a b'         a web page",
    ]
    monkeypatch.setattr(sys, "argv", ["/bin/imgclf"])
    long = "runs/" + "x" * 60
    assert display.next_commands(long, predicts=False) == [f"  imgclf report --workdir {long}"]


@pytest.mark.thorough
def test_a_transcript_of_80_columns(tmp_path):
    """The first line comes before JAX is imported; the head and the rows fit; files are as ever."""
    words = [sys.executable, "-X", "importtime", str(ROOT / "launch.py"), f"--workdir={tmp_path}/run",
             "--config.total=2 epochs", "--config.eval_every=1 epochs"]  # fmt: skip
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "COLUMNS": "80"}
    )
    lines = done.stderr.splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(r"\d\d:\d\d:\d\d training digits.py in ", line))
    assert not [line for line in lines[:first] if line.endswith(" jax")]
    said = [line for line in lines if not line.startswith("import time:")]
    assert [line for line in said if len(line) > 80 and str(tmp_path) not in line] == []
    text = "\n".join(said)
    for fact in ("data       digits: 1,437 images of 28x28x1, 10 classes of 139 to 146", "121,930 parameters",
                 "            block         output  parameters   FLOPs", "optimizer  adam", "seed       0",
                 "  best"):  # fmt: skip
        assert fact in text
    assert f"report --workdir {tmp_path}/run" in done.stdout
