"""Groups of runs and what tells them apart; predictions in files; charts: all from files that a test writes."""

import csv
import io
import itertools
import json
import math
import re
import statistics
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from html_page import Page
from ml_collections import ConfigDict

import launch
from imgclf_jax import config as configs
from imgclf_jax.config import default_config
from imgclf_jax.run import record
from imgclf_jax.tools.compare import comparison, paired, predictions
from imgclf_jax.tools.compare import tables as compare_tables
from imgclf_jax.tools.pages import charts, html


@pytest.fixture
def write(tmp_path):
    """Writes the files of a run of 10 steps, which has ended if `done`."""

    def run(name, accuracy=0.9, done=True, metrics=None, steps=10, recorded=None, **settings):
        place = tmp_path / name
        place.mkdir(parents=True)
        config = default_config()
        config.total = "10 steps"
        for key, value in settings.items():
            parent = config[key.split("__")[0]] if "__" in key else config
            parent[key.split("__")[-1]] = value
        (place / "config.json").write_text(configs.to_json(config))
        data = {"train_examples": 64, "image_shape": [12, 12, 1], "class_names": ["a", "b"], "fingerprint": "x"}
        (place / "provenance.json").write_text(json.dumps({"data": data, "evals": {"test": "y"}} | (recorded or {})))
        found = metrics or {"accuracy": accuracy, "loss": 1 - accuracy, "top5": 1.0}
        accuracy = found["accuracy"]
        if done:
            (place / "result.json").write_text(json.dumps({"step": steps, "test": {"examples": 400, **found}}))
        lines = [
            {"step": step, "train/loss": 40.0 / step, "test/accuracy": accuracy * step / 10} for step in (1, 5, 10)
        ]
        lines = lines if done else lines[:2]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return place

    return run


def groups(tmp_path):
    return comparison.group_runs(record.find([str(tmp_path)])[0])


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path, write):
    """The best group comes first; keys that only locate data do not separate runs."""
    values = {("adam", 0): 0.8, ("adam", 1): 0.9, ("sgd", 0): 0.95, ("sgd", 1): 0.93, ("sgd", 2): 0.97}
    for (optimizer, seed), accuracy in values.items():
        write(f"x/{optimizer}{seed}", accuracy, optimizer=optimizer, seed=seed, data__threads=seed, clip=2.0)
    found = groups(tmp_path)
    assert [dict(one.settings) for one in found] == [{"optimizer": "sgd"}, {"optimizer": "adam"}]
    assert [one.seeds for one in found] == [[0, 1, 2], [0, 1]]
    assert found[0].metrics()["test/accuracy"] == pytest.approx((3, 0.95, statistics.stdev([0.95, 0.93, 0.97])))
    assert comparison.common(found)["clip"] == 2.0
    assert not {"seed", "optimizer", "data.threads"} & set(comparison.common(found))


def test_runs_that_stop_early_are_the_same_only_if_they_evaluate_at_the_same_steps(tmp_path, write):
    """`eval_every` decides at which step they stop; for other runs it is a cadence, which separates nothing."""
    for seed, every in enumerate(("1 epochs", "2 epochs", "2 epochs")):
        write(f"fixed/{seed}", seed=seed, eval_every=every)
        write(f"stopped/{seed}", 0.8, seed=seed, eval_every=every, stop="test/loss, patience 2 epochs")
    fixed, *stopped = found = groups(tmp_path)
    assert [one.seeds for one in found] == [[0, 1, 2], [0], [1, 2]]
    assert [one.settings["eval_every"] for one in stopped] == ["1 epochs", "2 epochs"]
    columns, rows = compare_tables.results(found)
    assert [row[columns.index("eval_every")] for row in rows] == ["", "1 epochs", "2 epochs"]
    assert "eval_every" not in fixed.label
    assert "eval_every" not in comparison.common(comparison.group_runs(record.find([str(tmp_path / "fixed")])[0]))
    alike = record.find([str(tmp_path / "stopped" / "1"), str(tmp_path / "stopped" / "2")])[0]
    assert comparison.common(comparison.group_runs(alike))["eval_every"] == "2 epochs"
    mixed = comparison.group_runs(record.find([str(tmp_path / "stopped" / "1"), str(tmp_path / "fixed" / "0")])[0])
    assert "eval_every" not in comparison.common(mixed)


def test_seeds_trained_at_once_count_each(tmp_path, write):
    """Their mean and standard deviation are pooled with those of a run of one seed, as of all four values."""
    values = [0.5, 0.6, 0.8]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    ensemble = {"ensemble_accuracy": 0.9}
    write("a", seed=0, num_seeds=3, metrics={"accuracy": mean, "accuracy_std": deviation, **ensemble})
    write("b", seed=3, metrics={"accuracy": 0.7})
    [one] = groups(tmp_path)
    assert one.seeds == [0, 1, 2, 3]
    assert one.metrics() == {"test/accuracy": pytest.approx((4, 0.65, statistics.stdev([*values, 0.7])))}


def test_the_same_run_in_two_directories(tmp_path, write):
    """The directory distinguishes them, for example before and after a code change."""
    for folder, seed in itertools.product(("before", "after"), (0, 1)):
        write(f"{folder}/{seed}", 0.9 if folder == "before" else 0.8, seed=seed)
    assert [dict(one.settings) for one in groups(tmp_path)] == [
        {"directory": str(tmp_path / folder)} for folder in ("before", "after")
    ]
    write("after/copy", 0.7, seed=1)
    assert [(one.settings["directory"].removeprefix(f"{tmp_path}/"), one.seeds) for one in groups(tmp_path)] == [
        ("before", [0, 1]), ("after", [0, 1]), ("after/copy", [1])]  # fmt: skip


def test_a_run_that_is_there_twice_ungroups_no_others(tmp_path, write):
    """Of other configs; those of its own are grouped by their directories."""
    for i, clip in enumerate((1.0, 2.0)):
        for seed in range(3):
            write(f"{'abc'[seed]}/{clip}", 0.9 - i / 10, seed=seed, clip=clip)
    write("d/again", 0.8, seed=1, clip=2.0)
    found = groups(tmp_path)
    assert [(one.label.replace(f"{tmp_path}", "."), one.seeds) for one in found] == [
        ("clip=1.0", [0, 1, 2]), *((f"clip=2.0, directory=./{name}", [seed])
                                   for name, seed in (("a", 0), ("b", 1), ("c", 2), ("d", 1)))]  # fmt: skip
    assert compare_tables.results(found)[1][0][:3] == ["1.0", "", "0, 1, 2"]


def test_runs_that_are_called_like_a_folder_of_a_run(tmp_path, write):
    """They were left out silently."""
    for name in ("checkpoints", "damaged", "profile", "tb"):
        write(name)
    assert [run.path.name for run in record.find([str(tmp_path)])[0]] == ["checkpoints", "damaged", "profile", "tb"]


def test_what_is_not_done_or_damaged(tmp_path, write):
    write("a/done", seed=0)
    write("a/extended", seed=1, steps=7)  # its result is that of the shorter run
    write("a/going", 0.5, done=False, seed=2)
    (write("b/result") / "result.json").write_text("[")
    (write("b/config") / "config.json").write_text("{}")
    (tmp_path / "c").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a")
    runs, damaged = record.find([str(tmp_path), str(tmp_path / "a")])
    assert [run.workdir.path.name for run in runs] == ["done", "extended", "going"]
    assert ["config" in damaged[0], "b/result is damaged" in damaged[1], len(damaged)] == [True, True, 2]
    [one] = comparison.group_runs(runs)
    assert (one.seeds, len(one.unfinished)) == ([0], 2)
    assert compare_tables.notes([one], [], False) == [
        "2 runs are unfinished and left out: `status` shows how far."]  # fmt: skip


def save(place, *right):
    """The predictions that `compare --test` saves, bool[n] for each seed."""
    predictions._save(record.read(place), {"test": np.stack(right)})


@pytest.fixture
def compared(tmp_path, write):
    """Three optimizers with two seeds each, and predictions of 400 examples; the third's are of other examples."""
    rng, right = np.random.default_rng(0), {}
    for (optimizer, chance), seed in itertools.product((("sgd", 0.9), ("adam", 0.8), ("rmsprop", 0.5)), (0, 1)):
        own = right[optimizer, seed] = rng.random(400) < chance
        recorded = {"evals": {"test": "other"}} if optimizer == "rmsprop" else None
        place = write(f"{optimizer}-{seed}", float(own.mean()), optimizer=optimizer, seed=seed, recorded=recorded)
        save(place, own)
    write("going", 0.3, done=False, optimizer="lion<b>", seed=0)
    return right


def test_json(tmp_path, compared, capsys):
    """The tests are those of the predictions in the files, by `tools.compare.paired`."""
    assert launch.main(["compare", str(tmp_path), "--format=json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [one["settings"]["optimizer"] for one in found["groups"]] == ["sgd", "adam", "rmsprop", "lion<b>"]
    assert found["best"] == {"optimizer": "sgd"}
    [one] = found["comparisons"]
    assert "cannot pair optimizer=rmsprop with the best, because their examples differ" in err
    first, second = (np.stack([compared[name, seed] for seed in (0, 1)]) for name in ("adam", "sgd"))
    assert one["difference"] == paired.difference(first, second)._asdict()
    p = [paired.mcnemar(first[i], second[i]) for i in (0, 1)]
    assert list(one["mcnemar_mid_p"].values()) == p
    assert list(one["holm"].values()) == paired.holm(p)
    assert one["examples"] == 400
    assert found["groups"][3]["unfinished"][0]["step"] == 5


@pytest.mark.parametrize("metrics", [{"spread": 1.0}, {"accuracy": math.nan}])
def test_runs_without_a_main_metric_have_no_best(tmp_path, write, metrics, capsys):
    """Their order is that of their names, which ranks nothing."""
    for name in ("a", "b"):
        place = write(name, seed=0, batch_size=16 if name == "a" else 32)
        (place / "result.json").write_text(json.dumps({"step": 10, "test": {"examples": 400, **metrics}}))
        (place / "metrics.jsonl").write_text("")
    file = tmp_path / "page.html"
    assert launch.main(["compare", str(tmp_path), "--format=json", f"--html={file}"]) == 0
    assert json.loads(capsys.readouterr().out)["best"] is None
    assert "Not ranked" in file.read_text()
    assert 'class="best"' not in file.read_text()
    assert "has the best" not in file.read_text()


def test_csv(tmp_path, compared, capsys):
    assert launch.main(["compare", str(tmp_path), "--format=csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["optimizer"], row["seeds"], row["unfinished"]) for row in rows] == [
        ("sgd", "0 1", "0"), ("adam", "0 1", "0"), ("rmsprop", "0 1", "0"), ("lion<b>", "", "1")]  # fmt: skip
    values = [float(compared["sgd", seed].mean()) for seed in (0, 1)]
    assert float(rows[0]["test/accuracy"]) == pytest.approx(statistics.mean(values))
    assert float(rows[0]["test/accuracy_std"]) == pytest.approx(statistics.stdev(values))
    assert rows[3]["test/accuracy"] == ""


def test_table(tmp_path, compared, capsys):
    assert launch.main(["compare", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [["sgd", "0, 1"], ["adam", "0, 1"], ["rmsprop", "0, 1"], ["adam", "test"]]
    assert re.fullmatch(r"0\.\d{4} ± 0\.\d{4}", rows[0][2])
    first, second = (np.stack([compared[name, seed] for seed in (0, 1)]) for name in ("adam", "sgd"))
    value, low, high = paired.difference(first, second)
    assert rows[3][2:4] == [f"{value:+.4f}", f"{low:+.4f} to {high:+.4f}"]
    assert "top5" not in out


def test_the_page(tmp_path, compared):
    """Well-formed, with names escaped; it loads nothing, and tables and figures have captions."""
    file = tmp_path / "page.html"
    assert launch.main(["compare", str(tmp_path), f"--html={file}"]) == 0
    text = file.read_text()
    page = Page(text)
    assert (page.open, page.wrong) == ([], [])
    assert "lion&lt;b&gt;" in text  # in the legend of the curves
    assert "<b>" not in text
    assert not re.search(r"https?:|url\(|@import|<script|<link|src=", text)
    tables = [attributes for tag, attributes in page.tags if tag == "table"]
    assert len(tables) == len([1 for tag, _ in page.tags if tag == "caption"]) == 2
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    pictures = [attributes for tag, attributes in page.tags if tag == "svg" and "role" in attributes]
    assert [own["aria-label"].split(". ")[0] for own in pictures] == ["test/accuracy", "train/loss"]
    assert "prefers-color-scheme: dark" in text
    for svg in re.findall(r"<svg viewBox.*?</svg>", text):
        ET.fromstring(svg)


def test_names_that_are_no_utf_8(tmp_path, write):
    """Of directories on the page."""
    for name in ("a\udcff/0", "b/0"):
        write(name, 1.0)
    file = tmp_path / "page.html"
    assert launch.main(["compare", str(tmp_path), f"--html={file}"]) == 0
    assert r"a\udcff" in file.read_text(encoding="utf-8")
    html.write(file, "<p>a\udcff</p>")
    assert file.read_text(encoding="utf-8") == r"<p>a\udcff</p>"


def test_no_run(tmp_path, capsys):
    assert launch.main(["compare", str(tmp_path)]) == 1
    assert "no run there or below" in capsys.readouterr().err
    assert launch.main(["compare", str(tmp_path / "x")]) == 1
    assert "is not a directory" in capsys.readouterr().err
    assert launch.main(["compare"]) == 2


def test_a_result_without_a_config_is_told_of(tmp_path, capsys):
    """The run was left out in silence."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text("{}")
    assert launch.main(["compare", str(tmp_path)]) == 1
    assert (
        f"skipped: {tmp_path / 'a'} holds no run: there is no {tmp_path / 'a' / 'config.json'}"
        in capsys.readouterr().err
    )


def test_damaged_predictions_are_left_out(tmp_path, write, capsys):
    for name, clip in (("a", 1.0), ("b", 2.0)):
        (write(name, clip=clip) / "predictions.npz").write_text("PK")
    assert launch.main(["compare", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "ignoring the damaged" in err
    assert "add --test" in out


@pytest.mark.parametrize("test", [False, True])
def test_why_there_are_no_paired_tests(tmp_path, write, capsys, test):
    """Saved predictions may have other examples, and who has passed --test cannot add it."""
    for name in "ab":
        recorded = {"evals": {"test": name}}
        save(write(name, 0.9, batch_size=16 if name == "a" else 32, recorded=recorded), np.arange(400) % 10 < 9)
    assert launch.main(["compare", str(tmp_path), *["--test"] * test, f"--html={tmp_path}/page.html"]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "page.html").read_text()):
        assert "no group has predictions that can be paired with those of the best" in " ".join(text.split())
        assert ("add --test" in text) == (not test)


def test_runs_whose_configs_say_the_same_of_other_data_or_code(tmp_path, write, capsys):
    """A mean over seeds that trained on two data sets, or with two versions of a module, describes no experiment."""
    one = {"modules": {"my_nets.py": "aa"}}
    write("a", seed=0, recorded=one)
    write("b", seed=1, recorded={"modules": {"my_nets.py": "bb", "other.py": "cc"}})
    write("c", seed=2, recorded=one | {"evals": {"test": "z"}})
    a, b, c = (tmp_path / name for name in "abc")
    assert comparison.differing_origins(groups(tmp_path)) == [
        f"{a} and {b} recorded a different modules.my_nets.py: their mean is of different runs",
        f"{a} and {c} recorded a different evaluation set test='test': their results are not comparable",
    ]
    assert launch.main(["compare", str(tmp_path)]) == 0
    assert "recorded a different modules.my_nets.py" in capsys.readouterr().err
    write("d", seed=3, clip=1.0, recorded=one)
    assert len(comparison.differing_origins(groups(tmp_path))) == 2  # another group may have other code


def test_runs_that_started_from_other_weights_or_drew_other_examples(tmp_path, write):
    """Files that a config names may be replaced between two seeds; a run without a record of one is not compared."""

    def facts(digest):
        data = {"train_examples": 64, "image_shape": [12, 12, 1], "class_names": ["a", "b"], "sampling": digest}
        extra = {"unlabeled": data | {"fingerprint": digest}}
        return {"init_from": {"path": "w.pth", "sha256": digest}, "fixed_sha256": digest,
                "data": data | {"fingerprint": "x", "extra": extra}}  # fmt: skip

    for seed, recorded in enumerate((facts("aa"), facts("bb"), {})):
        write("abc"[seed], seed=seed, recorded=recorded)
    a, b = tmp_path / "a", tmp_path / "b"
    kinds = ("data.sampling", "data.extra.unlabeled.sampling", "data.extra.unlabeled.fingerprint", "init_from.sha256",
             "fixed_sha256")  # fmt: skip
    assert comparison.differing_origins(groups(tmp_path)) == [
        f"{a} and {b} recorded a different {kind}: their mean is of different runs" for kind in kinds
    ]


def test_runs_with_other_first_sets_are_ranked_by_one_metric(tmp_path, write, capsys):
    """That of the first run: the page named the first set of the group that turned out the best."""
    first = {"dev": "train[:10%]", "test": "test"}
    for name, evals, dev, test in (("a", {"test": "test"}, None, 0.90), ("b", first, 0.80, 0.95),
                                   ("c", first, 0.97, 0.94)):  # fmt: skip
        place = write(name, clip=float(ord(name)), data__eval=ConfigDict(evals))
        result = {"step": 10, "test": {"examples": 400, "accuracy": test}}
        (place / "result.json").write_text(json.dumps(result | ({"dev": {"accuracy": dev}} if dev else {})))
        (place / "metrics.jsonl").write_text("")
    file = tmp_path / "page.html"
    assert launch.main(["compare", str(tmp_path), "--format=json", f"--html={file}"]) == 0
    assert json.loads(capsys.readouterr().out)["best"] == {"clip": 98.0, "data.eval": first}
    assert "clip=98.0" in file.read_text()
    assert "has the best test/accuracy: 0.9500" in file.read_text()


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.913, 0.957), (-3.0, 1234.0), (0.0, 1e-7), (5.0, 5.5), (0.0, 3e-13)]
)
def test_ticks(low, high):
    """Round numbers in equal steps, inside the range; three to ten of them."""
    found = charts.ticks(low, high)
    steps = np.diff(found)
    assert 3 <= len(found) <= 10
    assert low - 1e-12 * high <= found[0]
    assert found[-1] <= high * (1 + 1e-9)
    assert np.allclose(steps, steps[0], rtol=1e-6)
    assert f"{steps[0]:.0e}"[0] in "125"


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.00003), (123_456.1, 123_458.9), (0.5, 0.9)])
def test_no_two_ticks_have_one_label(low, high):
    """Also where they differ in the seventh digit."""
    lines = [charts.Line("n", 0, [(0, low), (9, high)])]
    texts = ET.fromstring(charts.chart("t", "x", lines)).iter("text")
    labels = [one.text for one in texts if one.get("text-anchor") == "end"]
    assert len(set(labels)) == len(labels) > 2


def test_a_chart_has_its_points():
    """The y axis is logarithmic from a factor of 20 on, and nonfinite values are gaps."""

    def heights(values):
        svg = charts.chart("t", "x", [charts.Line("n", 0, list(enumerate(values)))])
        shape = next(path.get("d") for path in ET.fromstring(svg).iter("path") if "line" in path.get("class"))
        return [float(y) for y in re.findall(r"[ML]\S+ (\S+?)(?=[ML]|$)", shape)], shape.count("M")

    (first, second, third), starts = heights([1.0, 2.0, 3.0])
    assert first - second == pytest.approx(second - third, abs=0.11)
    assert first > third
    assert starts == 1
    (first, second, third), _ = heights([1.0, 10.0, 100.0])
    assert first - second == pytest.approx(second - third, abs=0.11)
    found, _ = heights([1e-3, 1e-3 * (1 + 5e-8), 1e-3])
    assert max(found) - min(found) < 0.2  # the rounding of a constant learning rate
    found, starts = heights([1.0, math.nan, 3.0])
    assert (len(found), starts) == (2, 2)
    assert charts.chart("t", "x", [charts.Line("n", 0, [(0, math.nan)])]) == ""


def test_a_chart_of_a_constant_starts_at_zero():
    """Not at 0.9 times its value, which would suggest a spread."""
    for value, low in ((1e-3, 0.0), (1.0, 0.0), (-2.0, -2.5), (0.0, 0.0)):
        svg = ET.fromstring(charts.chart("t", "x", [charts.Line("n", 0, [(0, value), (9, value)])]))
        numbers = [float(one.text) for one in svg.iter("text") if one.get("text-anchor") == "end"]
        assert min(numbers) == low
        assert max(numbers) >= value


def test_the_ends_of_a_line_do_not_stretch_a_logarithmic_axis():
    """A learning rate warms up from 0 and ends at 0; the path reaches the axis there, and the title says the value."""
    for last in (0.0, 1e-12):
        points = [(0, 0.0), *((x, 10 ** (-x / 2)) for x in range(1, 9)), (9, last)]
        svg = ET.fromstring(charts.chart("t", "x", [charts.Line("n", 0, points)]))
        numbers = [one.text for one in svg.iter("text") if one.get("text-anchor") == "end"]
        assert ("logarithmic" in numbers, min(float(n) for n in numbers if n != "logarithmic") >= 1e-4) == (True, True)
        points = [one for one in svg.iter("circle") if one.get("class").startswith("point")]
        assert points[-1].find("title").text == f"n, x 9: {last:g}"
        assert points[-1].get("cy") == points[-2].get("cy") == points[0].get("cy") == "240.0"


def test_a_chart_says_its_values():
    points = [(x, float(x)) for x in range(0, 1001, 1)]
    svg = ET.fromstring(charts.chart("t", "step", [charts.Line("n", 0, points)]))
    titles = [one.find("title").text for one in svg.iter("circle")]
    assert (len(titles), titles[0], titles[-1]) == (100, "n, step 0: 0", "n, step 1000: 1000")
    assert {"step", "1k"} < {one.text for one in svg.iter("text")}
